//! Safe, typed wrappers over the Linux kernel interfaces that no well-kept crate covers.
//!
//! All `unsafe` of the workspace lives here and in `limosa-puppet`. A module here knows one kernel
//! interface and nothing about checkpoints: it takes descriptors, PIDs and plain structs, and gives
//! back plain structs or a [`Error`] that says which call failed on what.
#![allow(unsafe_code)]

pub mod cpu;
mod error;
pub mod eventfd;
pub mod fault;
mod guarded;
pub mod handle;
pub mod keyring;
pub mod memory;
pub mod mount;
pub mod mqueue;
pub mod namespace;
pub mod net;
pub mod pagemap;
pub mod probe;
pub mod proc;
pub mod ptrace;
pub mod signals;
pub mod spawn;
pub mod sysv;
pub mod task;
pub mod terminal;
pub mod timer;
pub mod userfaultfd;

pub use error::{Error, Result};
