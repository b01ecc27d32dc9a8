//! `limosa-target KIND RESULT [OPTION…]`: a program that holds kernel objects of one kind and can tell
//! whether they are whole.
//!
//! It sets itself up, prints `ready` on standard output, and then waits for requests, as long as it lives:
//!
//! | who | what |
//! | --- | --- |
//! | target | prints `ready\n` |
//! | test | makes the file `RESULT.go` (by rename), holding `verify` or `quit` |
//! | target | removes `RESULT.go`, checks its whole state |
//! | target | makes the file `RESULT` (by rename), holding `ok[ DETAIL]` or `FAIL: REASON` |
//!
//! Requests are files that are looked for by path every few milliseconds, so that waiting holds no kernel object of
//! its own: what is in the process is what the kind put there. Standard input, output and error are the caller's.
//! A check leaves the state as it was, so that it can be asked for again: after each of many restores, and in a source
//! that was left running. `quit` checks once more and exits, with status 0 only if all was whole.

mod child;
mod kinds;
mod protocol;
mod sys;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use protocol::{Protocol, Request};

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("limosa-target: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<bool> {
    let mut arguments = std::env::args().skip(1);
    let (Some(kind), Some(result)) = (arguments.next(), arguments.next()) else {
        bail!("usage: limosa-target KIND RESULT [OPTION…]; kinds: {}", kinds::names().join(", "));
    };
    let set_up = kinds::find(&kind)
        .with_context(|| format!("no kind is called {kind}; there are: {}", kinds::names().join(", ")))?;
    let protocol = Protocol::new(result.into());
    let mut verify = set_up(&kinds::Setting { protocol: protocol.clone(), options: arguments.collect() })
        .with_context(|| format!("setting up {kind}"))?;
    println!("ready");
    serve(&protocol, &mut *verify)
}

/// Answers requests until one says `quit`; tells whether the last check found everything whole.
fn serve(protocol: &Protocol, verify: &mut kinds::Verify) -> Result<bool> {
    loop {
        let request = protocol.wait();
        let outcome = verify();
        protocol.answer(&outcome)?;
        if request == Request::Quit {
            return Ok(outcome.is_ok());
        }
    }
}
