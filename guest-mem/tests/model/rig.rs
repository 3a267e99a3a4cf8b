//! What the model is made of, for the crate's own tests: they look inside.

pub mod fakes;
pub mod interleavings;
pub mod plan;
pub mod rng;
pub mod swap;
pub mod world;
