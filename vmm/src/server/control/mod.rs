//! What crosses rooms: requests, and what comes of them, carried out on all the parts that they concern.

mod requests;
pub mod talk;
