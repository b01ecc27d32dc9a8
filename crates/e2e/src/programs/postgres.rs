//! PostgreSQL under a running pgbench. pgbench's transactions move amounts between four tables, so that their sums
//! are equal whatever was interrupted, and none that was acknowledged may be missing.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::Program;
use crate::ground::{Ground, check_alive};
use crate::wait_for;

const PORT: &str = "5490";
const PATIENCE: Duration = Duration::from_mins(1);

/// The server, and pgbench with two connections.
pub struct Postgres<'g> {
    ground: &'g dyn Ground,
    server: Pid,
    load: Child,
}

impl<'g> Postgres<'g> {
    /// Makes a database cluster, starts the server, fills pgbench's tables and starts pgbench.
    pub fn start(ground: &'g dyn Ground) -> Result<Self> {
        let directory = ground.directory().join("postgres");
        fs::create_dir(ground.seen(&directory))?;
        fs::set_permissions(ground.seen(&directory), fs::Permissions::from_mode(0o777))?;
        let server =
            ground.start("postgres", &server(&directory)?.iter().map(OsStr::new).collect::<Vec<_>>())?;
        let wait = || {
            check_alive(ground, "postgres", server)?;
            Ok(finish(ground, "pg_isready", &["-q"]).ok())
        };
        wait_for("PostgreSQL getting ready", PATIENCE, wait)?;
        finish(ground, "pgbench", &["-i", "-q", "postgres"])?;
        let mut load = client(
            ground,
            "pgbench",
            &["-n", "-c", "2", "-j", "1", "-T", "3600", "-P", "1", "--log", "postgres"],
        )?;
        let said = File::create(ground.clients().join("pgbench.log"))?;
        let load = {
            let _among = ground.among_clients()?;
            load.stdout(said.try_clone()?).stderr(said).spawn().context("starting pgbench")?
        };
        Ok(Self { ground, server, load })
    }

    /// Lets pgbench come to its end, and compares what it says with what is in the database: every transaction that it
    /// was told is committed is there, none is there twice, none failed.
    pub fn end_load(&mut self) -> Result<String> {
        // This is how it notices that the time given by -T is over.
        kill_process(Pid::from_child(&self.load), Signal::ALARM)?;
        let status = wait_for("the end of pgbench", PATIENCE, || Ok(self.load.try_wait()?))?;
        let said = self.load_said()?;
        ensure!(status.success(), "pgbench ended with {status}: {said}");
        let figure = |name: &str| {
            let line = said.lines().find_map(|line| line.strip_prefix(name));
            let digits = line.map(|line| line.trim().split(|other: char| !other.is_ascii_digit()).next());
            digits.flatten().and_then(|digits| digits.parse::<u64>().ok())
        };
        let processed =
            figure("number of transactions actually processed:").context("pgbench says no total")?;
        ensure!(figure("number of failed transactions:") == Some(0), "transactions failed: {said}");
        let there = self.history()?;
        ensure!(there == processed, "pgbench counts {processed} transactions, the database {there}");
        Ok(format!("{processed} transactions, all of them there"))
    }

    /// Ends the server as an administrator would.
    pub fn stop(&self) -> Result<()> {
        let server = self.root();
        kill_process(server, Signal::INT)?;
        let ended = waitpid(Some(server), WaitOptions::empty())?;
        let status = ended.and_then(|(_, status)| status.exit_status());
        ensure!(status == Some(0), "the server ended with status {status:?}");
        Ok(())
    }

    fn load_said(&self) -> Result<String> {
        Ok(fs::read_to_string(self.ground.clients().join("pgbench.log"))?)
    }

    /// Transactions that pgbench was told are committed.
    fn acknowledged(&self) -> Result<u64> {
        let mut lines = 0;
        for entry in fs::read_dir(self.ground.clients())? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pgbench_log.")) {
                lines += fs::read_to_string(path)?.lines().count() as u64;
            }
        }
        Ok(lines)
    }

    /// Runs a query over a connection of its own.
    fn query(&self, query: &str) -> Result<String> {
        finish(self.ground, "psql", &["-XAtc", query, "postgres"])
    }

    fn history(&self) -> Result<u64> {
        Ok(self.query("select count(*) from pgbench_history")?.trim().parse()?)
    }
}

impl Program for Postgres<'_> {
    fn root(&self) -> Pid {
        self.ground.root(self.server)
    }

    fn verify(&mut self) -> Result<String> {
        if let Some(status) = self.load.try_wait()? {
            bail!("pgbench ended with {status}: {}", self.load_said()?);
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

/// What makes a cluster in `directory` and becomes its server, as PostgreSQL's user: it refuses to run as root.
fn server(directory: &Path) -> Result<Vec<String>> {
    let (sockets, data) = (directory.display(), directory.join("data"));
    let (data, initdb, postgres) = (data.display(), program_path("initdb")?, program_path("postgres")?);
    // Durable on a tmpfs means nothing, and this is no test of the disk.
    let script = format!(
        "{} --no-sync --auth=trust -D {data} && echo \"host all all all trust\" >> {data}/pg_hba.conf && \
         exec {} -D {data} -k {sockets} -p {PORT} -c fsync=off -c \"listen_addresses=*\"",
        initdb.display(),
        postgres.display()
    );
    let user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--", "sh", "-c"];
    Ok(user.iter().map(|word| (*word).to_owned()).chain([script]).collect())
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

/// A client program of PostgreSQL's, for this server.
fn client(ground: &dyn Ground, program: &str, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(program_path(program)?);
    command.args(["-h", &ground.address().to_string(), "-p", PORT, "-U", "postgres"]).args(arguments);
    command.current_dir(ground.clients()).stdin(Stdio::null());
    Ok(command)
}

/// Runs a client program to its end; gives its standard output.
fn finish(ground: &dyn Ground, program: &str, arguments: &[&str]) -> Result<String> {
    let _among = ground.among_clients()?;
    let output =
        client(ground, program, arguments)?.output().with_context(|| format!("running {program}"))?;
    let failed = || format!("{program}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}", failed());
    Ok(String::from_utf8(output.stdout)?)
}
