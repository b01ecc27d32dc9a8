//! What a migration needs on the other host.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde::Deserialize;

use crate::hosts::Host;
use crate::program::{Limosa, Running};

/// What a listening `limosa receive --json` says first.
#[derive(Deserialize)]
struct Ticket {
    destination: String,
}

/// Starts `limosa receive` on `host` and waits for the destination that it prints. An error of `check` ends it.
pub fn receive(limosa: &Limosa, host: &Host, check: impl FnMut() -> Result<()>) -> Result<(Running, String)> {
    receive_with(limosa, host, check, |command| command.stdin(Stdio::null()))
}

/// Likewise, with what `adapt` adds to the command.
pub fn receive_with(
    limosa: &Limosa,
    host: &Host,
    mut check: impl FnMut() -> Result<()>,
    adapt: impl FnOnce(&mut Command) -> &mut Command,
) -> Result<(Running, String)> {
    let listen = format!("{}:0", host.address);
    let mut receiver = limosa.start_with(host, ["--json", "receive", "--listen", &listen], adapt)?;
    loop {
        if let Some(Ticket { destination }) = receiver.first() {
            return Ok((receiver, destination));
        }
        check()?;
        if !receiver.step()? {
            let said = receiver.finish()?;
            bail!("limosa receive ended without a ticket: {said}");
        }
        ensure!(receiver.age() < Duration::from_secs(30), "limosa receive prints no ticket");
    }
}
