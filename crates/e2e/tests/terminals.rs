//! Containers with a terminal of their own (`limosa run --tty`): bash with jobs, checkpointed, restored and migrated, with
//! somebody before the terminal on each side.

use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use limosa_e2e::sandbox::{Sandbox, sandboxed, wait_until_alone};
use limosa_e2e::{built, wait_for};
use limosa_stage::{Host, Limosa, MARK, join, receive};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{self, LocalModes};

const PATIENCE: Duration = Duration::from_secs(20);

/// Somebody at a terminal, from which one `limosa` was started.
struct Person {
    master: OwnedFd,
    slave: OwnedFd,
    former: LocalModes,
    limosa: Child,
    /// What was shown and not looked for yet.
    shown: String,
}

impl Person {
    /// Types `limosa ARGUMENTS` on `host`, in a terminal of so many rows and columns.
    fn at(host: &Host, mark: &str, size: (u16, u16), arguments: &[&str]) -> Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        resize(&slave, size)?;
        let end = || slave.try_clone().map(Stdio::from);
        let _there = host.place.enter()?;
        // A session with this terminal, as a login makes it.
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--"]).arg(built("limosa")?).arg("--state-dir").arg(&host.state_dir);
        command.args(arguments).env(MARK, mark);
        command.env("TMPDIR", host.state_dir.parent().unwrap_or(&host.state_dir));
        let former = termios::tcgetattr(&slave)?.local_modes;
        let limosa = command.stdin(end()?).stdout(end()?).stderr(end()?).spawn()?;
        Ok(Self { master, slave, former, limosa, shown: String::new() })
    }

    fn types(&self, text: &str) -> Result<()> {
        ensure!(rustix::io::write(&self.master, text.as_bytes())? == text.len(), "typed too fast");
        Ok(())
    }

    /// Waits until the terminal shows `text`; what came before is forgotten.
    fn sees(&mut self, text: &str) -> Result<()> {
        let begun = Instant::now();
        while !self.shown.contains(text) {
            ensure!(begun.elapsed() < PATIENCE, "{text:?} is not shown, but {:?}", self.shown);
            self.look()?;
        }
        let at = self.shown.find(text).map_or(0, |at| at + text.len());
        self.shown.drain(..at);
        Ok(())
    }

    /// Types a command, and waits until `answer` is shown.
    fn asks(&mut self, command: &str, answer: &str) -> Result<()> {
        self.shown.clear();
        self.types(&format!("{command}\n"))?;
        self.sees(answer).with_context(|| format!("after {command:?}"))
    }

    /// Takes what is shown, for a moment.
    fn look(&mut self) -> Result<()> {
        let mut polled = [PollFd::new(&self.master, PollFlags::IN)];
        if rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 }))? > 0 {
            let mut buffer = [0; 4096];
            let length = rustix::io::read(&self.master, &mut buffer)?;
            self.shown.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        Ok(())
    }

    /// Waits until the program has ended; the terminal is as it was before it.
    fn ends(&mut self) -> Result<ExitStatus> {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.limosa.try_wait()? {
                break status;
            }
            ensure!(begun.elapsed() < PATIENCE, "limosa does not end: {:?}", self.shown);
            self.look()?;
        };
        self.look()?;
        let modes = termios::tcgetattr(&self.slave)?.local_modes;
        ensure!(modes == self.former, "the terminal was left in another mode: {modes:?}");
        Ok(status)
    }
}

impl Drop for Person {
    fn drop(&mut self) {
        let _ = self.limosa.kill();
        let _ = self.limosa.wait();
    }
}

fn resize(terminal: &OwnedFd, (rows, columns): (u16, u16)) -> Result<()> {
    let mut size = termios::tcgetwinsize(terminal)?;
    (size.ws_row, size.ws_col) = (rows, columns);
    Ok(termios::tcsetwinsize(terminal, size)?)
}

/// Two hosts, and the program.
struct Stage {
    limosa: Limosa,
    a: Host,
    b: Host,
}

impl Stage {
    fn new(sandbox: &Sandbox) -> Result<Self> {
        let limosa = Limosa::find(Some(built("limosa")?))?;
        let (a, b) = (Host::new("A", 1, sandbox.path("a"))?, Host::new("B", 2, sandbox.path("b"))?);
        join(&a, &b)?;
        Ok(Self { limosa, a, b })
    }

    fn run(&self, host: &Host, arguments: &[&str]) -> Result<String> {
        self.limosa.run(host, || Ok(()), arguments)
    }

    fn person(&self, host: &Host, size: (u16, u16), arguments: &[&str]) -> Result<Person> {
        Person::at(host, &self.limosa.mark, size, arguments)
    }

    fn migrate(&self, from: &Host, to: &Host) -> Result<()> {
        let (receiver, destination) = receive(&self.limosa, to, || Ok(()))?;
        self.run(from, &["migrate", "shell", &destination])?;
        receiver.finish().map(drop)
    }

    fn shell(&self, size: (u16, u16)) -> Result<Person> {
        let bash = ["bash", "--norc", "--noprofile", "-i"];
        let mut person = self.person(
            &self.a,
            size,
            &[&["run", "shell", "--tty", "--env", "PS1=[ready] ", "--"], &bash[..]].concat(),
        )?;
        person.sees("[ready] ")?;
        person.asks("x=kept; sleep 1000 | cat &", "[ready] ")?;
        person.types("sleep 500 | cat\n")?;
        stops(&mut person)?;
        person.sees("[ready] ")?;
        Ok(person)
    }
}

/// Stops the pipeline, when all of it is there, runs, and is in the foreground: bash loses track of what comes earlier.
fn stops(person: &mut Person) -> Result<()> {
    wait_for("a job in the foreground", PATIENCE, || {
        let mut sleepers = 0;
        for pid in limosa_e2e::sandbox::processes()? {
            let of = |file| std::fs::read_to_string(format!("/proc/{}/{file}", pid.as_raw_pid()));
            let (Ok(line), Ok(stat)) = (of("cmdline"), of("stat")) else { continue };
            if line == "sleep\x00500\x00" || line == "cat\0" {
                let (_, fields) = stat.rsplit_once(')').context("no name")?;
                let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
                // State, process group, and the group in the foreground of its terminal.
                sleepers += usize::from(fields[0] == "S" && fields[2] == fields[5]);
            }
        }
        Ok((sleepers == 2).then_some(()))
    })?;
    person.types("\x1a")?;
    person.sees("Stopped")
}

/// The shell is as it was, jobs and all, on this terminal.
fn is_whole(person: &mut Person, (rows, columns): (u16, u16)) -> Result<()> {
    person.asks("echo $x-$x", "kept-kept")?;
    person.asks("jobs", "Running")?;
    person.sees("Stopped")?;
    person.asks("stty size", &format!("\r{rows} {columns}\r\n"))?;
    person.asks("tty", "\r/dev/pts/0\r\n")?;
    person.asks("echo by-name >/dev/tty", "\rby-name\r\n")?;
    // Job control: the stopped pipeline comes into the foreground, and goes back.
    person.asks("fg %2", "sleep 500 | cat")?;
    stops(person)?;
    person.asks("echo again-$x", "again-kept")
}

fn foreground(sandbox: &Sandbox, stage: &Stage) -> Result<()> {
    let mut first = stage.shell((33, 99))?;
    let [running, ended] = ["running", "ended"].map(|name| sandbox.path(name).display().to_string());
    stage.run(&stage.a, &["checkpoint", "shell", "--out", &running, "--leave-running"])?;
    is_whole(&mut first, (33, 99)).context("after a checkpoint that leaves it running")?;

    stage.run(&stage.a, &["checkpoint", "shell", "--out", &ended])?;
    first.sees("it was saved to")?;
    let status = first.ends()?;
    ensure!(status.code() == Some(137), "{status}");

    let mut second = stage.person(&stage.a, (40, 100), &["restore", &ended])?;
    second.sees("process")?;
    is_whole(&mut second, (40, 100)).context("after a restore in the foreground")?;
    resize(&second.slave, (50, 120))?;
    second.asks("stty size", "\r50 120\r\n")?;

    stage.migrate(&stage.a, &stage.b)?;
    second.sees("it moved to limosa://10.99.0.2")?;
    second.ends()?;

    let mut third = stage.person(&stage.b, (25, 80), &["attach", "shell"])?;
    is_whole(&mut third, (25, 80)).context("migrated")?;
    let error = stage.run(&stage.b, &["attach", "shell"]).err().context("two are attached")?;
    ensure!(format!("{error:#}").contains("somebody else is attached"), "{error:#}");
    third.types("(sleep 1; echo meanwhile-$x) &\n\x1d")?;
    third.sees("left container shell")?;
    ensure!(third.ends()?.success(), "leaving is a failure");
    wait_for("what nobody saw in the log", PATIENCE, || {
        Ok(stage.run(&stage.b, &["logs", "shell"])?.contains("meanwhile-kept").then_some(()))
    })?;

    stage.migrate(&stage.b, &stage.a)?;
    let mut fourth = stage.person(&stage.a, (26, 81), &["attach", "shell"])?;
    is_whole(&mut fourth, (26, 81)).context("migrated back")?;
    let log = stage.run(&stage.a, &["logs", "shell"])?;
    ensure!(log.contains("meanwhile-kept"), "the log was left behind: {log:?}");
    fourth.types("kill %1 %2; exit\n")?;
    fourth.types("exit\n")?;
    ensure!(fourth.ends()?.success(), "the end of the shell is no failure of attach");
    stage.run(&stage.a, &["rm", "shell"])?;
    drop((first, second, third, fourth));
    wait_until_alone()
}

#[test]
fn a_shell_in_the_foreground() {
    sandboxed(|sandbox| foreground(sandbox, &Stage::new(sandbox)?));
}

/// Detached from the start, a terminal is there, and somebody can attach; its restore is detached, too.
fn detached(sandbox: &Sandbox, stage: &Stage) -> Result<()> {
    let out = sandbox.path("out").display().to_string();
    stage.run(
        &stage.a,
        &["run", "shell", "--tty", "--detach", "--env", "PS1=[ready] ", "--", "bash", "--norc"],
    )?;
    let mut first = stage.person(&stage.a, (30, 90), &["attach", "shell"])?;
    first.asks("y=there; echo $y-$y", "there-there")?;
    // Whoever leaves by closing the terminal harms nobody.
    drop(first);
    stage.run(&stage.a, &["checkpoint", "shell", "--out", &out])?;
    let pid = stage.run(&stage.a, &["--json", "restore", &out, "--detach"])?;
    let mut second = stage.person(&stage.a, (31, 91), &["attach", "shell"])?;
    second.asks("echo $y-$y", "there-there").context(pid)?;
    second.asks("stty size", "\r31 91\r\n")?;
    stage.run(&stage.a, &["checkpoint", "shell", "--out", &format!("{out}-2")])?;
    second.sees("it was saved to")?;
    second.ends()?;

    // A terminal that its owner has closed is no terminal any more: the shell that ignores it cannot be carried.
    let mut third = stage.person(&stage.a, (31, 91), &["restore", &out])?;
    third.sees("process")?;
    third.asks("trap '' HUP; exec 5<&0; exec sleep 1000", "exec sleep")?;
    wait_for("the sleep", PATIENCE, || {
        let list: serde_json::Value = serde_json::from_str(&stage.run(&stage.a, &["ps", "--json"])?)?;
        let pid = list[0]["pid"].as_i64().context("it does not run")?;
        Ok((std::fs::read(format!("/proc/{pid}/comm"))? == b"sleep\n").then_some(()))
    })?;
    drop(third);
    let refused = wait_for("the refusal", PATIENCE, || {
        match stage.run(&stage.a, &["checkpoint", "shell", "--out", &format!("{out}-3")]) {
            Ok(_) => bail!("a terminal that hung up was carried"),
            Err(error) => Ok(Some(format!("{error:#}"))),
        }
    })?;
    ensure!(refused.contains("it hung up"), "{refused}");
    stage.run(&stage.a, &["rm", "--force", "shell"])?;
    drop(second);
    wait_until_alone()
}

#[test]
fn a_shell_that_is_detached() {
    sandboxed(|sandbox| detached(sandbox, &Stage::new(sandbox)?));
}
