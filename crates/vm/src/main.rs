//! `limosa-vm-init`: process 1 of a virtual machine, and the agent that runs what a test wants.
//!
//! ```text
//! process 1: mounts, loads modules, starts ── the agent ── commands
//!            then reaps everybody's orphans
//! ```
//!
//! They are two processes because whoever reaps all orphans also reaps children that somebody waits for. When the agent
//! ends, or process 1 fails, the machine is switched off; the test sees that its port is closed, and the console says why.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use limosa_vm::initramfs::MODULES;
use limosa_vm::protocol::{Event, PORT, Request, Stream, encode};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change, mount_move};
use rustix::process::{Pid, Signal, WaitOptions, kill_process};

/// How the agent is told from process 1.
const AGENT: &str = "agent";
/// Processes that outlive a command may hold its output open; its end is reported nevertheless.
const REST_OF_OUTPUT: Duration = Duration::from_millis(500);

fn main() {
    let outcome = if std::env::args().nth(1).as_deref() == Some(AGENT) { serve() } else { boot() };
    if let Err(error) = outcome {
        eprintln!("limosa-vm-init: {error:#}");
    }
    if std::process::id() == 1 {
        // Nothing is written to any disk. There is nobody to tell that it failed.
        let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    }
}

/// What process 1 does.
fn boot() -> Result<()> {
    anyhow::ensure!(std::process::id() == 1, "this is process 1 of a virtual machine of Limosa's tests");
    leave_rootfs().context("making a root that can be left")?;
    mounts()?;
    modules()?;
    let agent =
        Command::new("/init").arg(AGENT).env("PATH", "/suite:/usr/bin").env("HOME", "/root").spawn()?;
    let agent = Pid::from_child(&agent);
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == agent => bail!("the agent ended: {status:?}"),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("waiting for children"),
        }
    }
}

/// The kernel's first mount cannot be left by pivot_root(2), which containers do: a bind mount of it becomes the root.
fn leave_rootfs() -> Result<()> {
    mount_bind("/", "/newroot")?;
    std::env::set_current_dir("/newroot")?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")?;
    Ok(())
}

/// What a Debian mounts, in memory.
fn mounts() -> Result<()> {
    for (kind, place, data) in [
        ("proc", "/proc", None),
        ("sysfs", "/sys", None),
        ("devtmpfs", "/dev", None),
        ("cgroup2", "/sys/fs/cgroup", None),
        ("tmpfs", "/tmp", Some(c"mode=1777")),
        ("tmpfs", "/run", Some(c"mode=755")),
        ("tmpfs", "/dev/shm", Some(c"mode=1777")),
        ("devpts", "/dev/pts", Some(c"mode=620,ptmxmode=666")),
        ("mqueue", "/dev/mqueue", None),
    ] {
        fs::create_dir_all(place)?;
        mount(kind, place, kind, MountFlags::empty(), data)
            .with_context(|| format!("mounting {kind} on {place}"))?;
    }
    // As systemd has it.
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)?;
    Ok(())
}

fn modules() -> Result<()> {
    let directory = Path::new("/").join(MODULES);
    for name in fs::read_to_string(directory.join("list"))?.lines() {
        let module = fs::read(directory.join(name))?;
        rustix::system::init_module(&module, c"").with_context(|| format!("loading {name}"))?;
    }
    // They are in the kernel now; their memory is the machine's.
    fs::remove_dir_all(&directory)?;
    Ok(())
}

/// What the agent knows of a command that runs.
#[derive(Default)]
struct Running {
    commands: Mutex<HashMap<u64, Pid>>,
}

impl Running {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Pid>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the agent does, until the test closes its port.
fn serve() -> Result<()> {
    let path = port()?;
    let port = OpenOptions::new().read(true).write(true).open(&path).context("opening the port")?;
    let mut to_test = port.try_clone()?;
    let (events, receiver) = channel::<Event>();
    std::thread::spawn(move || {
        for event in receiver {
            let line = encode(&event).unwrap_or_default();
            if to_test.write_all(&line).is_err() {
                break;
            }
        }
    });
    events.send(Event::Ready)?;
    let running = Arc::new(Running::default());
    for line in BufReader::new(port).lines() {
        let line = line.context("reading from the port")?;
        match serde_json::from_str(&line).with_context(|| format!("understanding {line:?}"))? {
            Request::Start { id, command } => start(id, &command, &events, &running)?,
            Request::Kill { id } => {
                if let Some(pid) = running.lock().get(&id) {
                    let _ = kill_process(*pid, Signal::KILL);
                }
            }
        }
    }
    Ok(())
}

/// The device of the port, once its driver has made it.
fn port() -> Result<PathBuf> {
    for _ in 0..500 {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            let device = Path::new("/dev").join(entry.file_name());
            if name.trim() == PORT && device.exists() {
                return Ok(device);
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("there is no virtio serial port called {PORT}")
}

fn start(id: u64, command: &[String], events: &Sender<Event>, running: &Arc<Running>) -> Result<()> {
    let spawned = Command::new(command.first().map_or("", String::as_str))
        .args(command.get(1..).unwrap_or_default())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn();
    match spawned {
        Ok(child) => {
            running.lock().insert(id, Pid::from_child(&child));
            let (events, running) = (events.clone(), Arc::clone(running));
            std::thread::spawn(move || follow(id, child, &events, &running));
        }
        Err(error) => {
            let line = format!("{command:?}: {error}\n");
            events.send(Event::Output { id, stream: Stream::Err, line })?;
            events.send(Event::Ended { id, status: None })?;
        }
    }
    Ok(())
}

/// Passes on what a command writes, and how it ends.
fn follow(id: u64, mut child: Child, events: &Sender<Event>, running: &Running) {
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (over, both) = channel::<()>();
    if let Some(out) = out {
        pass_on(id, Stream::Out, out, events.clone(), over.clone());
    }
    if let Some(err) = err {
        pass_on(id, Stream::Err, err, events.clone(), over);
    }
    let status = child.wait().ok().and_then(|status| status.code());
    running.lock().remove(&id);
    wait_for_rest(&both);
    let _ = events.send(Event::Ended { id, status });
}

/// Until both streams have ended, or have been quiet for a while.
fn wait_for_rest(both: &Receiver<()>) {
    // Nothing is sent: the channel ends with the last of the two senders.
    let _ = both.recv_timeout(REST_OF_OUTPUT);
}

fn pass_on(
    id: u64,
    stream: Stream,
    from: impl Read + Send + 'static,
    events: Sender<Event>,
    over: Sender<()>,
) {
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while from.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).into_owned();
            if events.send(Event::Output { id, stream, line: text }).is_err() {
                break;
            }
            line.clear();
        }
        drop(over);
    });
}
