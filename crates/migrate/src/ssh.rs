//! A connection through `ssh`: it runs `limosa receive` on the other machine and carries its standard input and output.

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::address::ConnectError;
use crate::limits::Limits;
use crate::transport::{Carrier, Transport};

/// The program to run instead of `ssh`.
pub const SSH_VARIABLE: &str = "LIMOSA_SSH";
/// What is run on the other machine instead of `limosa`, for one that is not in the search path there.
pub const REMOTE_VARIABLE: &str = "LIMOSA_REMOTE";
/// Pipes to and from ssh hold so much; the default of 64 KiB means a switch of processes for each.
const PIPE_BYTES: usize = 1 << 20;
/// What is kept of ssh's standard error, in bytes.
const SAID_BYTES: usize = 2048;

/// Runs ssh.
pub(crate) fn connect(
    user: Option<&str>,
    host: &str,
    port: Option<u16>,
    limits: &Limits,
) -> Result<Transport, ConnectError> {
    let program = std::env::var_os(SSH_VARIABLE).unwrap_or_else(|| "ssh".into());
    let remote = std::env::var(REMOTE_VARIABLE).unwrap_or_else(|_| "limosa".to_owned());
    let target = user.map_or_else(|| host.to_owned(), |user| format!("{user}@{host}"));
    let mut command = Command::new(&program);
    command.arg("-T").arg("-o").arg(format!("ConnectTimeout={}", limits.connect.as_secs().max(1)));
    if let Some(port) = port {
        command.arg("-p").arg(port.to_string());
    }
    command.arg(&target).arg(remote).arg("receive");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let failed = |source| ConnectError::Run { program: program.to_string_lossy().into_owned(), source };
    let mut child = command.spawn().map_err(failed)?;
    let (input, output, errors) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let said = Arc::new(Mutex::new(String::new()));
    let carrier = Ssh { child, said: Arc::clone(&said) };
    let (Some(input), Some(output), Some(errors)) = (input, output, errors) else {
        return Err(failed(io::ErrorKind::BrokenPipe.into()));
    };
    std::thread::spawn(move || listen(errors, &said));
    let (input, output) = (OwnedFd::from(input), OwnedFd::from(output));
    for pipe in [&input, &output] {
        // Only for speed; above /proc/sys/fs/pipe-max-size it is refused.
        let _ = rustix::pipe::fcntl_setpipe_size(pipe, PIPE_BYTES);
    }
    let mut transport =
        Transport::from_descriptors(output, input, format!("ssh to {target}")).map_err(failed)?;
    transport.carrier = Some(Box::new(carrier));
    Ok(transport)
}

/// Keeps the end of what ssh, and the program it runs, write on standard error.
fn listen(errors: ChildStderr, said: &Mutex<String>) {
    let mut errors = BufReader::new(errors);
    let mut line = Vec::new();
    while (&mut errors).take(SAID_BYTES as u64).read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
        let text = crate::message::printable(String::from_utf8_lossy(&line).trim_end());
        tracing::info!(target: "limosa::ssh", "{text}");
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        if !said.is_empty() {
            said.push('\n');
        }
        said.push_str(&text);
        while said.len() > SAID_BYTES {
            // Whole lines from the front, or all of it.
            let cut = said.find('\n').map_or(said.len(), |at| at + 1);
            said.drain(..cut);
        }
        line.clear();
    }
}

struct Ssh {
    child: Child,
    said: Arc<Mutex<String>>,
}

impl Carrier for Ssh {
    fn said(&self) -> Option<String> {
        // It closed its output a moment ago; its last words may still be on their way.
        std::thread::sleep(Duration::from_millis(100));
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        (!said.is_empty()).then(|| said.clone())
    }
}

impl Drop for Ssh {
    fn drop(&mut self) {
        // Its standard input is closed by now, so it ends by itself, unless the network hangs.
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                _ => return,
            }
        }
        // An error means that it has ended meanwhile.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
