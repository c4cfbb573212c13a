//! memory (skeleton).
pub mod layout;
pub use layout::RegionSpec;
