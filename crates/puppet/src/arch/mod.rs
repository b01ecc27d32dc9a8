//! What depends on the processor: the stubs, the names of the system calls, code that leads on from a vDSO.

mod x86_64;

pub use x86_64::{
    RESIDENT, RESIDENT_WAIT, SYSCALL_INSTRUCTION, VISITOR, VisitorLayout, redirect, syscall_name,
    visitor_layout,
};
