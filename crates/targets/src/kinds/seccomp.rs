//! Seccomp filters: two on the process, one more on a thread, each seen by the error that it gives.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::thread::set_no_new_privs;

use super::{Setting, Verify, creds};
use crate::sys;

/// Calls that nothing here makes for real, and the errors that the filters give for them.
const CALLS: [(i64, i32); 3] = [(libc::SYS_swapoff, 77), (libc::SYS_acct, 78), (libc::SYS_quotactl, 79)];

pub fn set_up(_: &Setting) -> Result<Box<Verify>> {
    set_no_new_privs(true)?;
    filter(CALLS[0])?;
    let (ask, asked) = channel::<()>();
    let (answers, answer) = channel();
    thread::Builder::new().name("filtered".into()).spawn(move || {
        let set_up = filter(CALLS[2]);
        let mut refused = Some(set_up);
        while asked.recv().is_ok() {
            let outcome = match refused.take() {
                Some(Err(error)) => Err(error),
                // Not the filter that the process got after this thread was made.
                _ => check(CALLS[0]).and_then(|()| check(CALLS[2])),
            };
            if answers.send(outcome).is_err() {
                return;
            }
        }
    })?;
    ask_thread(&ask, &answer)?;
    filter(CALLS[1])?;
    let described = creds::describe()?;
    Ok(Box::new(move || {
        sys::compare_lines("credentials", &creds::describe()?, &described)?;
        check(CALLS[0])?;
        check(CALLS[1])?;
        ensure!(check(CALLS[2]).is_err(), "the process has a filter of its thread's");
        ask_thread(&ask, &answer)?;
        Ok(String::new())
    }))
}

fn ask_thread(ask: &Sender<()>, answer: &Receiver<Result<()>>) -> Result<()> {
    ask.send(()).context("the filtered thread is gone")?;
    answer.recv_timeout(Duration::from_secs(5)).context("the filtered thread does not answer")?
}

/// The call fails with the filter's own error.
fn check((call, error): (i64, i32)) -> Result<()> {
    // SAFETY: with null arguments none of these calls does anything, filtered or not.
    let outcome = sys::check(unsafe { libc::syscall(call, 0, 0, 0, 0) });
    let found = outcome.as_ref().err().and_then(io::Error::raw_os_error);
    ensure!(found == Some(error), "call {call} gives {outcome:?} instead of the filter's error {error}");
    Ok(())
}

/// A filter that lets everything pass but one call.
fn filter((call, error): (i64, i32)) -> Result<()> {
    let statement = |code: u32, jump: (u8, u8), value: u32| libc::sock_filter {
        code: code as u16,
        jt: jump.0,
        jf: jump.1,
        k: value,
    };
    let mut program = [
        // The call's number is the first word of what a filter sees.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, (0, 0), 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, (0, 1), call as u32),
        statement(libc::BPF_RET | libc::BPF_K, (0, 0), libc::SECCOMP_RET_ERRNO | error as u32),
        statement(libc::BPF_RET | libc::BPF_K, (0, 0), libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the kernel copies the program.
    sys::check(unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
    })
    .context("installing a seccomp filter")?;
    Ok(())
}
