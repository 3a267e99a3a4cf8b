//! The memory manager against a model: fakes that keep to the kernel's rules, random and exhaustive runs of operations,
//! and every invariant after every step.

mod balloon;
mod exhaustive;
mod failures;
mod fakes;
mod generations;
mod halves;
mod interleavings;
mod plan;
mod pressure;
mod random;
mod rng;
mod stories;
mod swap;
mod world;
