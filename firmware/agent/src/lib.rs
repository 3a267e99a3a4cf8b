//! The agent of Offshoot's Linux guests: the protocol that it speaks, and its image.
//!
//! The agent is a program in the guest. A client on the host (`offshoot exec`, `cp`, `forward`) has one connection to it for
//! each thing that it wants done, over virtio-vsock. This library is what both sides share, and knows nothing of either:
//!
//! | module | has |
//! | --- | --- |
//! | [`message`] | what is said, and how it is written as bytes |
//! | [`frame`] | reading and writing messages on a stream |
//! | [`tar`] | the archives that files travel in |
//! | [`tree`] | packing a tree of files into an archive, and unpacking one below a directory |
//!
//! `image/` is the guest's program, which the build script compiles and links statically. [`IMAGE`] is the finished file.
//!
//! # A connection
//!
//! ```text
//! client                               agent
//!   Hello {protocol, generation} ───►
//!                                ◄───  Hello {protocol, generation}, or Failed
//!   Start / Attach / List / …    ───►
//!                                ◄───  Started, Out, Err, …, Exit, or Failed
//! ```
//!
//! The generation is the VM's, as its server counts them, and 0 for a VM that was launched. A VM that was forked has an agent
//! that knows nothing of it until it is told (`Forked`), so it says the generation of an ancestor, or waits: who talks to a
//! child never talks to a guest whose random numbers are its parent's.
//!
//! # What holds
//!
//! * A frame has at most [`frame::MAX_FRAME`] bytes, and reading one takes a bounded multiple of that, whatever the bytes say.
//! * No bytes make this library panic.
//! * What is unpacked below a directory stays below it, whatever the archive says.
#![forbid(unsafe_code)]

pub mod frame;
pub mod message;
pub mod tar;
pub mod tree;
mod wire;

/// The agent, a static program for x86-64 Linux.
#[cfg(not(agent_image))]
pub static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/offshoot-agent"));

/// The version of the protocol. A client and an agent of different ones do not talk.
pub const PROTOCOL: u32 = 1;
/// The vsock port that the agent listens on.
pub const PORT: u32 = 1;
