//! What a test and the agent in its machine say to each other: lines of JSON, over a virtio serial port.
//!
//! ```text
//!  test                            agent
//!    │ <───────────────────────── ready │   booted, modules loaded
//!    │ start {id, command} ───────────> │
//!    │ <───── output {id, stream, line} │   any number, lines of different commands in any order
//!    │ kill {id} ─────────────────────> │   ... SIGKILL, where it still runs
//!    │ <──────────── ended {id, status} │   after the last line
//! ```

use serde::{Deserialize, Serialize};

/// The port's name, by which the agent finds it.
pub const PORT: &str = "limosa";

/// What a test wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Run a command, without standard input.
    Start {
        /// Chosen by the test, once.
        id: u64,
        /// The program, searched for in `PATH`, and its arguments.
        command: Vec<String>,
    },
    /// Kill a command.
    Kill {
        /// The command's.
        id: u64,
    },
}

/// What happened in the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The machine can run commands.
    Ready,
    /// A command wrote a line.
    Output {
        /// The command's.
        id: u64,
        /// Where it wrote it.
        stream: Stream,
        /// With its end, if it has one.
        line: String,
    },
    /// A command has ended, or could not be started (which its standard error then says).
    Ended {
        /// The command's.
        id: u64,
        /// Its exit status; none where a signal ended it.
        status: Option<i32>,
    },
}

/// A standard descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// A message as a line.
pub fn encode<M: Serialize>(message: &M) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}
