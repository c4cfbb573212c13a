//! virtq (skeleton).
