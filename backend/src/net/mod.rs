//! net (skeleton).
