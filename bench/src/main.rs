//! vubench: loads and measures any vhost-user network back-end.
fn main() {}
