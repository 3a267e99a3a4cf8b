//! VM processes: who makes them, what they say, their memory, and those that are prepared.

pub mod expect;
pub mod inbox;
pub mod pool;
pub mod process;
pub mod window;
pub mod zygote;
