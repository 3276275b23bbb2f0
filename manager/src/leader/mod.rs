//! What runs while this manager leads.

mod batch;

pub use batch::{Batch, pack};
