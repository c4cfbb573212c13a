//! reactor (skeleton).
