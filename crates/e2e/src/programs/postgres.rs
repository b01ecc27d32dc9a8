//! PostgreSQL under a running pgbench. pgbench's transactions move amounts between four tables, so that their sums
//! are equal whatever was interrupted, and none that was acknowledged may be missing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::Program;
use super::start;
use crate::sandbox::Sandbox;
use crate::wait_for;

const PORT: &str = "5490";
const PATIENCE: Duration = Duration::from_mins(1);

/// The server, and pgbench with two connections.
pub struct Postgres {
    server: Child,
    load: Child,
    directory: PathBuf,
}

impl Postgres {
    /// Makes a database cluster, starts the server, fills pgbench's tables and starts pgbench.
    pub fn start(sandbox: &Sandbox) -> Result<Self> {
        let directory = sandbox.directory().join("postgres");
        fs::create_dir(&directory)?;
        fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
        let data = directory.join("data");
        let data = data.to_str().context("a path that is not UTF-8")?;
        finish(&directory, &["initdb", "--no-sync", "--auth=trust", "-D", data])?;
        // Durable on a tmpfs means nothing, and this is no test of the disk.
        let sockets = directory.to_str().context("a path that is not UTF-8")?;
        let command = as_postgres(&["postgres", "-D", data, "-k", sockets, "-p", PORT, "-c", "fsync=off"])?;
        let server = start(&directory, "server", &command)?;
        let ready = ["pg_isready", "-q", "-h", "127.0.0.1", "-p", PORT];
        wait_for("PostgreSQL getting ready", PATIENCE, || Ok(finish(&directory, &ready).ok()))?;
        finish(&directory, &["pgbench", "-h", "127.0.0.1", "-p", PORT, "-i", "-q", "postgres"])?;
        let load = as_postgres(&[
            "pgbench",
            "-h",
            "127.0.0.1",
            "-p",
            PORT,
            "-n",
            "-c",
            "2",
            "-j",
            "1",
            "-T",
            "3600",
            "-P",
            "1",
            "--log",
            "postgres",
        ])?;
        let load = start(&directory, "pgbench", &load)?;
        Ok(Self { server, load, directory })
    }

    /// Ends pgbench and the server as an administrator would.
    pub fn stop(mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.load), Signal::TERM)?;
        self.load.wait()?;
        kill_process(Pid::from_child(&self.server), Signal::INT)?;
        let status = self.server.wait()?;
        ensure!(status.success(), "the server ended with {status}");
        Ok(())
    }

    /// Transactions that pgbench was told are committed.
    fn acknowledged(&self) -> Result<u64> {
        let mut lines = 0;
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pgbench_log.")) {
                lines += fs::read_to_string(path)?.lines().count() as u64;
            }
        }
        Ok(lines)
    }

    /// Runs a query over a connection of its own.
    fn query(&self, query: &str) -> Result<String> {
        finish(&self.directory, &["psql", "-h", "127.0.0.1", "-p", PORT, "-XAtc", query, "postgres"])
    }
}

impl Program for Postgres {
    fn root(&self) -> Pid {
        Pid::from_child(&self.server)
    }

    fn verify(&mut self) -> Result<String> {
        if let Some(status) = self.load.try_wait()? {
            let log = fs::read_to_string(self.directory.join("pgbench.log"))?;
            bail!("pgbench ended with {status}: {log}");
        }
        let before = self.history()?;
        wait_for("transactions going on", PATIENCE, || Ok((self.history()? > before + 20).then_some(())))?;
        let acknowledged = self.acknowledged()?;
        let answer = self.query(
            "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), \
             (select sum(tbalance) from pgbench_tellers), (select sum(delta) from pgbench_history), \
             (select count(*) from pgbench_history)",
        )?;
        let numbers = answer.trim().split('|').map(str::parse).collect::<Result<Vec<i64>, _>>()?;
        let [accounts, branches, tellers, history, count] = numbers[..] else {
            bail!("psql says {answer:?}")
        };
        ensure!(
            accounts == branches && branches == tellers && tellers == history,
            "the sums of accounts, branches, tellers and history differ: {answer}"
        );
        ensure!(
            count as u64 >= acknowledged,
            "{acknowledged} transactions were acknowledged, {count} are there"
        );
        Ok(format!("{count} transactions"))
    }
}

impl Postgres {
    fn history(&self) -> Result<u64> {
        Ok(self.query("select count(*) from pgbench_history")?.trim().parse()?)
    }
}

/// A command of PostgreSQL's, run as its user, because the server refuses to run as root.
fn as_postgres(command: &[&str]) -> Result<Vec<String>> {
    let mut words: Vec<String> =
        ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--"].map(Into::into).into();
    let (program, arguments) = command.split_first().context("no command")?;
    words.push(program_path(program)?.to_string_lossy().into_owned());
    words.extend(arguments.iter().map(|word| (*word).to_owned()));
    Ok(words)
}

/// Debian keeps the server's programs outside of PATH, by version; the newest is taken.
fn program_path(program: &str) -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .context("PostgreSQL is not installed (scripts/ensure-packages test)")?
        .filter_map(|version| Some(version.ok()?.path().join("bin").join(program)))
        .filter(|path| path.exists())
        .collect();
    found.sort();
    found.pop().with_context(|| format!("no {program} in /usr/lib/postgresql"))
}

/// Runs a command of PostgreSQL's to its end; gives its standard output.
fn finish(directory: &Path, command: &[&str]) -> Result<String> {
    let words = as_postgres(command)?;
    let output = Command::new(&words[0])
        .args(&words[1..])
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {}", command[0]))?;
    ensure!(
        output.status.success(),
        "{}: {}\n{}",
        command.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}
