//! What options of the command line do, and what is left when a command fails or is interrupted.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use limosa_e2e::ground::Ground;
use limosa_e2e::limosa::{self, Said, Source};
use limosa_e2e::programs::{Program, Redis};
use limosa_e2e::sandbox::{Sandbox, sandboxed, tree, wait_until_alone, wait_until_gone};
use limosa_e2e::target::Target;
use limosa_e2e::{built, wait_for};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

const PATIENCE: Duration = Duration::from_secs(20);

/// `--tcp close`: redis comes back whole and listens, its former clients are told that their connections are closed.
fn closed_connections(sandbox: &Sandbox) -> Result<()> {
    let mut redis = Redis::start(sandbox, 2_000)?;
    redis.verify()?;
    let out = sandbox.path("closed");
    let processes = tree(redis.root())?;
    limosa::checkpoint(sandbox, redis.root(), &out, Source::Ends, &["--tcp", "close"])?
        .success("checkpoint")?;
    wait_until_gone(&processes)?;
    limosa::restore(sandbox, &out, &[])?;
    redis.reconnect().context("after a restore without connections")?;
    println!("{}", redis.verify().context("with new connections")?);
    sandbox.end_all()
}

#[test]
#[expect(clippy::redundant_closure, reason = "the sandbox finds the test by the name of its closure")]
fn connections_can_be_left_behind() {
    sandboxed(|sandbox| closed_connections(sandbox));
}

/// `limosa --state-dir …`
fn on_host(sandbox: &Sandbox, arguments: &[&str]) -> Result<Said> {
    let state = sandbox.path("state");
    let options = [OsStr::new("--state-dir"), state.as_os_str()];
    limosa::run(sandbox, options.into_iter().chain(arguments.iter().map(OsStr::new)))
}

/// Waits until the file is longer than it was.
fn grows(file: &Path) -> Result<()> {
    let length = || Ok::<_, anyhow::Error>(fs::metadata(file)?.len());
    let before = length()?;
    wait_for(&format!("more in {}", file.display()), PATIENCE, || Ok((length()? > before).then_some(())))
}

/// `--external`, `--root` and `--name` for a container: a process in it writes to a file of the host.
fn container_elsewhere(sandbox: &Sandbox) -> Result<()> {
    on_host(sandbox, &["run", "job", "--detach", "--", "sleep", "1000"])?.success("run")?;
    let (first, second) = (sandbox.path("first.txt"), sandbox.path("second.txt"));
    let script = "setsid sh -c 'while :; do echo line; sleep 0.02; done' </dev/null 2>/dev/null &";
    let exec = Command::new(built("limosa")?)
        .arg("--state-dir")
        .arg(sandbox.path("state"))
        .args(["exec", "job", "--", "sh", "-c", script])
        .stdin(Stdio::null())
        .stdout(File::create(&first)?)
        .status()?;
    ensure!(exec.success(), "limosa exec: {exec}");
    grows(&first)?;

    let out = sandbox.path("job").display().to_string();
    let said = on_host(sandbox, &["checkpoint", "job", "--out", &out])?;
    let refused = said.status == Some(1) && said.err.contains("first.txt") && said.err.contains("--external");
    ensure!(refused && !Path::new(&out).exists(), "a file of the host, not named: {said:?}");
    let named = format!("lines={}", first.display());
    on_host(sandbox, &["checkpoint", "job", "--out", &out, "--external", &named])?.success("checkpoint")?;
    let length = fs::copy(&first, &second)?;

    let (root, pidfile) = (sandbox.path("root"), sandbox.path("pid"));
    fs::create_dir(&root)?;
    rustix::mount::mount("/", &root, "", MountFlags::BIND, None)?;
    let (named, place) = (format!("lines={}", second.display()), root.display().to_string());
    let nowhere = ["--external", &named, "--pidfile", "/no/such/pid"];
    let nowhere: Vec<&str> = ["restore", &out, "--detach"].into_iter().chain(nowhere).collect();
    let said = on_host(sandbox, &nowhere)?;
    ensure!(said.status == Some(1) && on_host(sandbox, &["ps", "--json"])?.out.trim() == "[]", "{said:?}");
    let pidfile = pidfile.display().to_string();
    let options =
        ["--name", "other", "--detach", "--pidfile", &pidfile, "--external", &named, "--root", &place];
    let arguments: Vec<&str> = ["restore", &out].into_iter().chain(options).collect();
    on_host(sandbox, &arguments)?.success("restore")?;
    grows(&second)?;
    ensure!(fs::metadata(&first)?.len() == length, "the restored process writes to the former file");
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", fs::read_to_string(&pidfile)?.trim()))?;
    ensure!(mounts.contains(&format!("lowerdir={place}")), "not on the root that was given: {mounts}");
    ensure!(on_host(sandbox, &["ps"])?.out.contains("other"), "it has another name");
    on_host(sandbox, &["rm", "--force", "other"])?.success("rm")?;
    Ok(rustix::mount::unmount(&root, UnmountFlags::DETACH)?)
}

#[test]
#[expect(clippy::redundant_closure, reason = "the sandbox finds the test by the name of its closure")]
fn a_container_comes_back_with_other_files_root_and_name() {
    sandboxed(|sandbox| container_elsewhere(sandbox));
}

/// Starts a program with so much memory that its restore takes a while, and makes a checkpoint of it.
fn large_checkpoint(sandbox: &Sandbox, out: &Path) -> Result<Pid> {
    let script = "x = b'x' * (256 << 20); print('ready', flush=True); import time; time.sleep(1000)";
    let root = sandbox.start("large", &["python3".as_ref(), "-c".as_ref(), script.as_ref()])?;
    wait_for("the large program", PATIENCE, || {
        Ok((fs::read_to_string(sandbox.path("large.out"))? == "ready\n").then_some(()))
    })?;
    limosa::checkpoint(sandbox, root, out, Source::Ends, &[])?.success("checkpoint")?;
    wait_until_alone()?;
    Ok(root)
}

/// Starts `limosa restore` in the foreground, and sends it `signal` once `moment` has come.
fn interrupted(
    sandbox: &Sandbox,
    out: &Path,
    signal: Signal,
    moment: impl Fn(&str) -> bool,
) -> Result<(ExitStatus, String)> {
    let (said, errors) = (sandbox.path("restore.out"), sandbox.path("restore.err"));
    let mut child = Command::new(built("limosa")?)
        .arg("restore")
        .arg(out)
        .stdin(Stdio::null())
        .stdout(File::create(&said)?)
        .stderr(File::create(&errors)?)
        .spawn()?;
    wait_for("the moment to interrupt a restore", PATIENCE, || {
        ensure!(child.try_wait()?.is_none(), "it has ended: {}", fs::read_to_string(&errors)?);
        Ok(moment(&fs::read_to_string(&said)?).then_some(()))
    })?;
    kill_process(Pid::from_child(&child), signal)?;
    Ok((child.wait()?, fs::read_to_string(errors)?))
}

/// Ctrl-C while memory is read ends all of it; a signal to a restore that waits goes to the tree, whose end is its end.
fn interruptions(sandbox: &Sandbox) -> Result<()> {
    let out = sandbox.path("large");
    let root = large_checkpoint(sandbox, &out)?;
    let (status, said) = interrupted(sandbox, &out, Signal::INT, |_| test_kill_process(root).is_ok())?;
    ensure!(status.code() == Some(130) && said.contains("nothing was restored"), "{status}: {said}");
    wait_until_alone().context("after an interrupted restore")?;

    let (status, said) = interrupted(sandbox, &out, Signal::TERM, |said| said.contains("runs"))?;
    ensure!(status.code() == Some(128 + 15), "SIGTERM was not passed on: {status}: {said}");
    wait_until_alone().context("after a restored tree's end")?;

    let directory = sandbox.path("no/such/pid").display().to_string();
    let place = out.display().to_string();
    let said = limosa::run(sandbox, ["restore", &place, "--detach", "--pidfile", &directory])?;
    ensure!(
        said.status == Some(1) && said.err.contains("nothing was restored"),
        "no place for a PID: {said:?}"
    );
    wait_until_alone().context("after a restore whose PID could not be told")
}

#[test]
#[expect(clippy::redundant_closure, reason = "the sandbox finds the test by the name of its closure")]
fn interrupted_and_failed_restores_leave_nothing() {
    sandboxed(|sandbox| interruptions(sandbox));
}

/// An epoll's entries are added by the process that holds it: the plan says so.
fn explained(sandbox: &Sandbox) -> Result<()> {
    let target = Target::start(sandbox, "events", &[])?;
    let out = sandbox.path("events-checkpoint");
    limosa::checkpoint(sandbox, target.root(), &out, Source::GoesOn, &[])?.success("checkpoint")?;
    let plan = limosa::run(sandbox, [OsStr::new("restore"), out.as_os_str(), "--explain".as_ref()])?;
    let plan = plan.success("restore --explain")?.out;
    ensure!(
        plan.contains("watch a descriptor") && plan.contains("epoll_ctl"),
        "no entry of an epoll in\n{plan}"
    );
    target.quit().map(drop)
}

#[test]
#[expect(clippy::redundant_closure, reason = "the sandbox finds the test by the name of its closure")]
fn a_plan_has_what_objects_ask_of_their_holders() {
    sandboxed(|sandbox| explained(sandbox));
}

/// Whoever is not root is told so, whatever the command, and nothing is made.
fn not_root(sandbox: &Sandbox) -> Result<()> {
    let program = sandbox.path("limosa");
    fs::copy(built("limosa")?, &program)?;
    let (out, state) = (sandbox.path("out"), sandbox.path("state"));
    let out = out.display().to_string();
    for (arguments, code) in [
        (vec!["run", "a", "--", "true"], 125),
        (vec!["exec", "a", "--", "true"], 125),
        (vec!["stop", "a"], 1),
        (vec!["rm", "a"], 1),
        (vec!["checkpoint", "a", "--out", &out], 1),
        (vec!["checkpoint", "pid:1", "--out", &out], 1),
        (vec!["migrate", "a", "ssh://b"], 1),
        (vec!["receive"], 1),
        (vec!["settle"], 1),
    ] {
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
            .arg(&program)
            .arg("--state-dir")
            .arg(&state)
            .args(&arguments)
            .stdin(Stdio::null())
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(code) && said.contains("not root") && said.contains("sudo"),
            "{arguments:?}: {output:?}"
        );
    }
    ensure!(!state.exists() && !Path::new(&out).exists(), "something was made");
    Ok(())
}

#[test]
#[expect(clippy::redundant_closure, reason = "the sandbox finds the test by the name of its closure")]
fn whoever_is_not_root_is_told_so() {
    sandboxed(|sandbox| not_root(sandbox));
}
