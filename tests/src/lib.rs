//! The lab: what whole-program tests, the demo and the benchmarks share.

mod artefacts;

pub use artefacts::{Artefacts, BACKEND, LAB_DIR, backend_binary, find_in_path, lab_dir};
