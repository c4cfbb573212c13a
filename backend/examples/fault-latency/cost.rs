//! What the programs cost: per context switch, and per fault.

/// Measures.
pub fn run() -> Result<(), Box<dyn std::error::Error>> {
    Err("to come".into())
}
