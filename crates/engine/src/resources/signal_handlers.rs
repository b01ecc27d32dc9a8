//! Dispositions of signals (sigaction(2)): `struct sigaction` as the kernel has it, handler, flags, restorer, mask.

use limosa_puppet::{Data, Outcome, Program};
use serde::{Deserialize, Serialize};

use super::ProcessAttribute;
use crate::error::CaptureError;
use crate::view::ProcessView;

const SIGNALS: i32 = 64;

/// The dispositions that are not the default.
#[derive(Debug, Serialize, Deserialize)]
pub struct SignalHandlers(pub Vec<Disposition>);

/// What happens on a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disposition {
    /// The signal.
    pub signal: i32,
    /// Address of the handler; 0 default, 1 ignore.
    pub handler: u64,
    /// `SA_*`
    pub flags: u64,
    /// Address of the code that returns from the handler.
    pub restorer: u64,
    /// Signals blocked while it runs.
    pub mask: u64,
}

/// Signals whose disposition can be set at all.
fn settable() -> impl Iterator<Item = i32> {
    (1..=SIGNALS).filter(|signal| *signal != libc::SIGKILL && *signal != libc::SIGSTOP)
}

/// Adds calls that make all dispositions the default.
pub fn reset_all(program: &mut Program) {
    let default = program.words(&[0; 4]);
    for signal in settable() {
        let arguments = [signal.into(), default.into(), 0.into(), 8.into()];
        program.call("reset a signal's disposition", libc::SYS_rt_sigaction, arguments);
    }
}

impl ProcessAttribute for SignalHandlers {
    type Asked = Vec<(i32, Data)>;

    fn ask(_: &ProcessView, program: &mut Program) -> Result<Self::Asked, CaptureError> {
        Ok(settable()
            .map(|signal| {
                let answer = program.space(32);
                let arguments = [signal.into(), 0.into(), answer.into(), 8.into()];
                program.call("ask for a signal's disposition", libc::SYS_rt_sigaction, arguments);
                (signal, answer)
            })
            .collect())
    }

    fn capture(_: &ProcessView, asked: &Self::Asked, outcome: &Outcome) -> Result<Self, CaptureError> {
        let disposition = |(signal, data): &(i32, Data)| Disposition {
            signal: *signal,
            handler: outcome.word(*data, 0),
            flags: outcome.word(*data, 1),
            restorer: outcome.word(*data, 2),
            mask: outcome.word(*data, 3),
        };
        let is_default = |entry: &Disposition| entry.handler == 0 && entry.flags == 0 && entry.mask == 0;
        Ok(Self(asked.iter().map(disposition).filter(|entry| !is_default(entry)).collect()))
    }

    fn rebuild(&self, program: &mut Program) {
        for entry in &self.0 {
            let action = program.words(&[entry.handler, entry.flags, entry.restorer, entry.mask]);
            let arguments = [entry.signal.into(), action.into(), 0.into(), 8.into()];
            program.call("set a signal's disposition", libc::SYS_rt_sigaction, arguments);
        }
    }
}
