//! Migration through a real ssh: sshd runs on the other host, and `limosa migrate` starts `limosa receive` there.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use limosa_e2e::contained::Contained;
use limosa_e2e::programs::{Program, Redis};
use limosa_e2e::sandbox::{Sandbox, processes, sandboxed};
use limosa_e2e::{built, wait_for};
use limosa_stage::Running;
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;

const PORT: u16 = 2222;
/// Where sshd goes to separate its privileges; compiled into it.
const EMPTY: &str = "/run/sshd";
/// Redis' keys of 1 KiB: enough that the connection can be cut while they are on their way.
const KEYS: u64 = 100_000;

/// sshd on the other host, with keys of its own, and what ssh needs to get in.
struct Ssh {
    server: Child,
    directory: PathBuf,
    destination: String,
    remote: String,
}

impl Ssh {
    fn start(sandbox: &Sandbox, container: &Contained) -> Result<Self> {
        let directory = sandbox.path("ssh");
        fs::create_dir(&directory)?;
        fs::create_dir(EMPTY)?;
        for key in ["host", "user", "stranger"] {
            let mut command = Command::new("ssh-keygen");
            command.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(directory.join(key));
            ensure!(command.status().context("running ssh-keygen")?.success(), "ssh-keygen failed");
        }
        let there = container.there();
        let address = there.address;
        let host_key = fs::read_to_string(directory.join("host.pub"))?;
        fs::write(directory.join("known_hosts"), format!("[{address}]:{PORT} {host_key}"))?;
        for key in ["user", "stranger"] {
            let place = directory.display();
            let client = format!(
                "IdentityFile {place}/{key}\nIdentitiesOnly yes\nBatchMode yes\nStrictHostKeyChecking yes\n\
                 UserKnownHostsFile {place}/known_hosts\nGlobalKnownHostsFile none\n"
            );
            fs::write(directory.join(format!("{key}.conf")), client)?;
            let wrapper = directory.join(format!("ssh-{key}"));
            fs::write(&wrapper, format!("#!/bin/sh\nexec ssh -F {place}/{key}.conf \"$@\"\n"))?;
            fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
        }
        let server = Self::serve(&directory, container)?;
        let remote =
            format!("env LIMOSA_STATE_DIR={} {}", there.state_dir.display(), built("limosa")?.display());
        Ok(Self { server, directory, destination: format!("ssh://root@{address}:{PORT}"), remote })
    }

    fn serve(directory: &Path, container: &Contained) -> Result<Child> {
        let (place, there) = (directory.display(), container.there());
        let settings = format!(
            "ListenAddress {}\nHostKey {place}/host\nAuthorizedKeysFile {place}/user.pub\nPidFile none\nUsePAM no\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n\
             StrictModes no\n",
            there.address
        );
        let configuration = directory.join("sshd.conf");
        fs::write(&configuration, settings)?;
        let log = directory.join("sshd.log");
        let _there = there.place.enter()?;
        let server = Command::new("/usr/sbin/sshd")
            .args(["-D", "-p", &PORT.to_string(), "-E"])
            .arg(&log)
            .arg("-f")
            .arg(&configuration)
            .stdin(Stdio::null())
            .spawn()
            .context("starting sshd (scripts/ensure-packages test)")?;
        wait_for("sshd listening", Duration::from_secs(10), || {
            Ok(fs::read_to_string(&log).is_ok_and(|said| said.contains("listening")).then_some(()))
        })?;
        Ok(server)
    }

    /// Starts `limosa migrate` with the key `key`.
    fn migrate(&self, container: &Contained, key: &str) -> Result<Running> {
        let wrapper = self.directory.join(format!("ssh-{key}"));
        let arguments = ["--json", "migrate", "--progress", "json", Contained::NAME, &self.destination];
        container.start(
            &arguments,
            &[("LIMOSA_SSH", wrapper.as_os_str()), ("LIMOSA_REMOTE", OsStr::new(&self.remote))],
        )
    }

    /// Cuts all connections, as a server that crashes does.
    fn cut(&self) -> Result<()> {
        for pid in processes()? {
            let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_pid())).unwrap_or_default();
            if name.trim() == "sshd" && pid != Pid::from_child(&self.server) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        Ok(())
    }

    fn stop(mut self) -> Result<()> {
        self.server.kill()?;
        self.server.wait()?;
        Ok(fs::remove_dir(EMPTY)?)
    }
}

/// A line of `--progress json`.
#[derive(Deserialize)]
struct Progress {
    phase: String,
    bytes: u64,
}

/// The error of a migration that must fail.
fn refusal(running: Running) -> Result<String> {
    match running.finish() {
        Ok(said) => anyhow::bail!("the migration succeeded: {said}"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

fn through_ssh(sandbox: &Sandbox) -> Result<()> {
    let container = Contained::new(sandbox)?;
    let mut redis = Redis::start(&container, KEYS)?;
    redis.verify()?;
    let ssh = Ssh::start(sandbox, &container)?;

    let said = refusal(ssh.migrate(&container, "stranger")?)?;
    ensure!(said.contains("Permission denied") && said.contains("runs on here"), "with a wrong key: {said}");
    redis.verify().context("after a wrong key")?;

    let mut running = ssh.migrate(&container, "user")?;
    while running.step()? {
        let line = running.last_error_line().and_then(|line| serde_json::from_str::<Progress>(line).ok());
        if line.is_some_and(|line| line.phase == "sending" && line.bytes > 8 << 20) {
            ssh.cut()?;
            break;
        }
    }
    let said = refusal(running)?;
    ensure!(said.contains("runs on here"), "with a lost connection: {said}");
    println!("a lost connection: {said}");
    redis.verify().context("after a lost connection")?;
    container.nothing_arrives()?;

    let report = ssh.migrate(&container, "user")?.finish()?;
    container.moved(report)?;
    println!("moved, frozen {:?}: {}", container.frozen(), redis.verify().context("moved")?);
    ssh.stop()?;
    container.end()
}

#[test]
#[expect(clippy::redundant_closure, reason = "the sandbox finds the test by the name of its closure")]
fn a_container_moves_through_ssh() {
    sandboxed(|sandbox| through_ssh(sandbox));
}
