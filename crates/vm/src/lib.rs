//! The virtual machines of `make test-vm`.
//!
//! | module | what it gives a test |
//! | --- | --- |
//! | [`kernel`] | Debian's cloud kernels that are installed, oldest first, and their modules |
//! | [`initramfs`] | the machine's whole file system: busybox, redis, limosa and its tests, with their libraries |
//! | [`cpio`] | the archive format of an initramfs |
//! | [`machine`] | a machine: booted under emulation, told what to run, killed |
//! | [`network`] | the cable between machines, and the test as a third host on it |
//! | [`counter`] | a client that keeps one connection to a redis, and counts |
//! | [`stage`] | a redis in a container that migrates between two machines |
//! | [`protocol`] | what test and machine say to each other |
//!
//! Every test runs in a sandbox of `limosa-e2e`: machines are processes in its PID namespace and their network cards are
//! interfaces in its network namespace, so that they are gone when it is, however it ends. No traffic leaves it.
//!
//! `src/main.rs` is process 1 of a machine.

pub mod counter;
pub mod cpio;
pub mod initramfs;
pub mod kernel;
pub mod machine;
pub mod network;
pub mod protocol;
pub mod stage;
