//! Parse, build, run: nothing else.
fn main() {}
