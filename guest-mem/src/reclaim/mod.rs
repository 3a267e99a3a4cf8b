//! Reclaim: which pages leave memory, how they go to swap, and how they come back. The policy is all here;
//! [`manager`](crate::manager) carries it out.

pub(crate) mod evict;
pub(crate) mod queue;
pub(crate) mod readahead;
pub(crate) mod swap_in;

pub use evict::Victim;
pub(crate) use queue::Return;
pub use swap_in::SwapIn;
