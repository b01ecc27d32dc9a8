//! Protection keys (pkeys(7)): which ones a process has taken.
//!
//! What each thread may do by them is in a register (PKRU), and which one guards a mapping the mapping says. Nothing tells which
//! are taken. But pkey_mprotect(2) fails in one way for a key that is not taken, and in another where there is no mapping: so
//! each is asked for, at an address where there is none. The key that the kernel takes itself for memory that may only be
//! executed is not told of, and is the kernel's again.

use limosa_kernel::cpu;
use limosa_puppet::{CallId, Outcome, Program, ProgramError};
use serde::{Deserialize, Serialize};

use super::ProcessAttribute;
use crate::error::{CaptureError, RestoreError};
use crate::view::ProcessView;

/// Keys that can be taken: everyone has key 0.
const KEYS: std::ops::Range<u32> = 1..16;
const PAGE: u64 = 4096;
/// The last page of an address space, and the first: one of them is free, if not both.
const PLACES: [u64; 2] = [0x7fff_ffff_e000, 0x1000];
/// The part of the registers that PKRU is (Intel SDM volume 1, 13.1).
const PKRU: u32 = 9;

/// The keys that a process has taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtectionKeys {
    /// A bit for each.
    pub taken: u16,
}

/// Whether the processor has keys, and the kernel uses them.
fn there_are_keys() -> bool {
    static THERE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *THERE.get_or_init(|| cpu::components().iter().any(|component| component.number == PKRU))
}

impl ProcessAttribute for ProtectionKeys {
    type Asked = Vec<(u32, CallId)>;

    fn ask(process: &ProcessView, program: &mut Program) -> Result<Self::Asked, CaptureError> {
        if !there_are_keys() {
            return Ok(Vec::new());
        }
        let is_free = |place: &u64| {
            !process.mappings.iter().any(|mapping| mapping.start < place + PAGE && *place < mapping.end)
        };
        let Some(place) = PLACES.into_iter().find(is_free) else { return Ok(Vec::new()) };
        let ask = |key: u32| {
            let arguments = [place.into(), PAGE.into(), libc::PROT_READ.into(), key.into()];
            (key, program.try_call("see whether a key is taken", libc::SYS_pkey_mprotect, arguments))
        };
        Ok(KEYS.map(ask).collect())
    }

    fn capture(_: &ProcessView, asked: &Self::Asked, outcome: &Outcome) -> Result<Self, CaptureError> {
        let is_taken = |call: CallId| match outcome.result(call) {
            Err(ProgramError::Call { source, .. }) => source.raw_os_error() == Some(libc::ENOMEM),
            _ => false,
        };
        let taken = asked.iter().filter(|(_, call)| is_taken(*call)).map(|(key, _)| 1 << key).sum();
        Ok(Self { taken })
    }

    /// They were taken before there were mappings.
    fn rebuild(&self, _: &mut Program) {}
}

impl ProtectionKeys {
    /// Whether the process has taken `key`.
    pub(crate) fn has(self, key: u32) -> bool {
        KEYS.contains(&key) && self.taken & 1 << key != 0
    }

    /// Checks that the keys of a checkpoint are ones that there are here.
    pub(crate) fn check(self) -> Result<(), RestoreError> {
        if self.taken & 1 != 0 {
            return Err(RestoreError::inconsistent("the protection key that everyone has is taken"));
        }
        if self.taken != 0 && !there_are_keys() {
            return Err(RestoreError::Processor {
                missing: "pku".into(),
                why: "a process has taken protection keys (pkeys(7))".into(),
                remedy: "restore it on a machine with them, or take the checkpoint before the program takes keys",
            });
        }
        Ok(())
    }

    /// Adds the calls that take the keys. The kernel gives the lowest that is free, so those between are given back. They forbid
    /// nothing yet: what they do when the process runs is in its threads' registers.
    pub(crate) fn take(self, program: &mut Program) {
        let end = u16::BITS - self.taken.leading_zeros();
        for _ in 1..end {
            program.call("take a protection key", libc::SYS_pkey_alloc, [0.into(), 0.into()]);
        }
        for key in (1..end).filter(|key| !self.has(*key)) {
            program.call("give a protection key back", libc::SYS_pkey_free, [key.into()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_taken_in_turn_and_those_between_given_back() {
        let calls = |taken: u16| {
            let mut program = Program::new();
            ProtectionKeys { taken }.take(&mut program);
            program.len()
        };
        assert_eq!(calls(0), 0);
        assert_eq!(calls(0b110), 2);
        assert_eq!(calls(0b100_0100), 6 + 4);
        assert!(ProtectionKeys { taken: 1 }.check().is_err());
        assert!(!ProtectionKeys { taken: u16::MAX }.has(16));
    }
}
