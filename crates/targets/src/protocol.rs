//! Requests and answers as files (see the crate's documentation).

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often a target looks for a request.
const PERIOD: Duration = Duration::from_millis(2);

/// What a test can ask of a target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// Check the state and go on.
    Verify,
    /// Check the state and exit.
    Quit,
}

/// The two files through which one process is asked and answers.
#[derive(Clone, Debug)]
pub struct Protocol {
    result: PathBuf,
}

impl Protocol {
    /// Answers go to `result`, requests come from the same path with `.go` appended.
    pub fn new(result: PathBuf) -> Self {
        Self { result }
    }

    /// A path beside the result that belongs to this target alone.
    pub fn beside(&self, name: &str) -> PathBuf {
        let mut path = self.result.clone().into_os_string();
        path.push(format!(".{name}"));
        path.into()
    }

    /// Waits for a request and takes it.
    pub fn wait(&self) -> Request {
        let go = self.beside("go");
        loop {
            if let Ok(text) = fs::read_to_string(&go) {
                let _ = fs::remove_file(&go);
                return if text.trim() == "quit" { Request::Quit } else { Request::Verify };
            }
            sleep(PERIOD);
        }
    }

    /// Writes the outcome of a check.
    pub fn answer(&self, outcome: &Result<String>) -> Result<()> {
        let text = match outcome {
            Ok(detail) if detail.is_empty() => "ok\n".to_owned(),
            Ok(detail) => format!("ok {detail}\n"),
            Err(error) => format!("FAIL: {error:#}\n"),
        };
        replace(&self.result, &text)
    }

    /// Asks the process that serves this protocol, and waits for its answer.
    pub fn ask(&self, request: Request, patience: Duration) -> Result<String> {
        let _ = fs::remove_file(&self.result);
        replace(&self.beside("go"), if request == Request::Quit { "quit\n" } else { "verify\n" })?;
        let deadline = Instant::now() + patience;
        loop {
            if let Ok(text) = fs::read_to_string(&self.result) {
                return match text.trim_end().strip_prefix("ok") {
                    Some(detail) => Ok(detail.trim().to_owned()),
                    None => bail!("{}", text.trim_end()),
                };
            }
            if Instant::now() > deadline {
                bail!("no answer in {} within {patience:?}", self.result.display());
            }
            sleep(PERIOD);
        }
    }
}

/// Makes a file appear with its whole content at once.
fn replace(path: &Path, text: &str) -> Result<()> {
    let mut temporary = path.to_owned().into_os_string();
    temporary.push(".tmp");
    fs::write(&temporary, text)
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("writing {}", path.display()))
}
