//! VM processes: who makes them, what they say, their memory, and those that are prepared.

pub mod answers;
pub mod births;
pub mod children;
pub mod expect;
pub mod inbox;
pub mod late;
pub mod pool;
pub mod process;
pub mod reap;
pub mod trial;
pub mod window;
pub mod zygote;
