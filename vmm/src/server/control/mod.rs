//! What crosses rooms: requests, what VM processes say, and their ends, carried out on all the parts that they concern.

mod births;
mod end;
mod expect;
mod freeze;
mod inbox;
mod late;
mod pool;
mod reap;
mod requests;
mod talk;
mod vsock;
