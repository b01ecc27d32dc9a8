//! Puppets: processes under our control that execute programs of system calls.
//!
//! A [`Program`] is data: system calls with their arguments, where an argument may be the result of an
//! earlier call or the address of a buffer that travels with the program. A stub of position-independent
//! assembly ([`mod@arch`]) walks it inside the puppet. Everything that decides anything stays outside, in
//! the controller. There are two kinds of puppets:
//!
//! - A [`Visit`] borrows a thread of a running process at checkpoint: it asks what only the thread itself
//!   can ask, and heals itself if the controller dies at any instant.
//! - A [`Resident`] is a process that consists of nothing but the stub, at restore: it builds itself into
//!   the process that was checkpointed.
#![allow(unsafe_code)]

pub mod arch;
mod arena;
mod program;
mod resident;
mod vdso;
mod vdso_image;
mod visit;

pub use arena::{Arena, ArenaError, Slice};
pub use program::{
    Arg, CallId, Data, Outcome, Program, ProgramError, RenderedProgram, ShownArgument, ShownCall,
};
pub use resident::{Birth, Resident, ResidentError, Running};
pub use vdso::{Vdso, elf_extent};
pub use vdso_image::{VdsoFunction, VdsoImage};
pub use visit::{Visit, VisitError, step_out_of_stub};
