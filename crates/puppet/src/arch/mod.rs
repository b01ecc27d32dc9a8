//! What depends on the processor: the stubs and the names of the system calls.

mod x86_64;

pub use x86_64::{
    RESIDENT, RESIDENT_WAIT, SYSCALL_INSTRUCTION, VISITOR, VisitorLayout, syscall_name, visitor_layout,
};
