//! The `limosa` program under test.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::process::Pid;

use crate::{built, sandbox::Sandbox};

/// What a run of the program said.
#[derive(Debug)]
pub struct Said {
    /// Its exit status; none where a signal ended it.
    pub status: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// Runs `limosa` with `arguments` and without standard input.
pub fn run<I: IntoIterator<Item: AsRef<OsStr>>>(sandbox: &Sandbox, arguments: I) -> Result<Said> {
    run_with(sandbox, arguments, [])
}

/// [`run`] with more environment variables.
pub fn run_with<'a, I: IntoIterator<Item: AsRef<OsStr>>>(
    sandbox: &Sandbox,
    arguments: I,
    variables: impl IntoIterator<Item = (&'static str, &'a OsStr)>,
) -> Result<Said> {
    // Standard output goes to files, not pipes: what a restored tree inherits must not keep this test waiting.
    let (out, err) = (sandbox.path("limosa.out"), sandbox.path("limosa.err"));
    let status = Command::new(built("limosa")?)
        .args(arguments)
        .envs(variables)
        .stdin(Stdio::null())
        .stdout(fs::File::create(&out)?)
        .stderr(fs::File::create(&err)?)
        .status()
        .context("running limosa")?;
    Ok(Said { status: status.code(), out: fs::read_to_string(out)?, err: fs::read_to_string(err)? })
}

impl Said {
    /// Fails, with all that was said, where the program failed.
    pub fn success(self, what: &str) -> Result<Self> {
        ensure!(self.status == Some(0), "limosa {what}: status {:?}\n{}{}", self.status, self.out, self.err);
        Ok(self)
    }
}

/// Whether a checkpoint ends what it was taken from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// It ends (the default of `limosa checkpoint`).
    Ends,
    /// It goes on (`--leave-running`).
    GoesOn,
}

/// `limosa checkpoint pid:N --out DIR`
pub fn checkpoint(
    sandbox: &Sandbox,
    root: Pid,
    out: &Path,
    source: Source,
    options: &[&str],
) -> Result<Said> {
    let target = format!("pid:{}", root.as_raw_pid());
    let mut arguments = vec![OsStr::new("checkpoint"), target.as_ref(), "--out".as_ref(), out.as_ref()];
    if source == Source::GoesOn {
        arguments.push("--leave-running".as_ref());
    }
    arguments.extend(options.iter().map(OsStr::new));
    run(sandbox, arguments)
}

/// `limosa restore DIR --detach --pidfile FILE`; gives the root's PID.
pub fn restore(sandbox: &Sandbox, checkpoint: &Path, options: &[&str]) -> Result<Pid> {
    let pidfile = sandbox.path("restored.pid");
    let _ = fs::remove_file(&pidfile);
    let mut arguments = vec![
        OsStr::new("restore"),
        checkpoint.as_ref(),
        "--detach".as_ref(),
        "--pidfile".as_ref(),
        pidfile.as_ref(),
    ];
    arguments.extend(options.iter().map(OsStr::new));
    run(sandbox, arguments)?.success("restore")?;
    let text = fs::read_to_string(&pidfile).context("limosa restore wrote no --pidfile")?;
    let pid = text.trim().parse().ok().and_then(Pid::from_raw);
    pid.with_context(|| format!("limosa restore wrote {text:?} into its --pidfile"))
}
