//! A virtual machine: qemu, emulating, without a disk.
//!
//! The kernel's console goes to a file, for messages when something fails. Commands go over a virtio serial port, whose
//! other end is a unix socket of the test's (see [`crate::protocol`]). A machine that is dropped is killed, as if its
//! power were cut.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use limosa_e2e::limosa::Said;
use limosa_e2e::sandbox::Sandbox;
use limosa_e2e::wait_for;

use crate::initramfs;
use crate::kernel::Kernel;
use crate::network::Card;
use crate::protocol::{Event, PORT, Request, Stream, encode};

/// Emulated machines are slow, and share the cores with others.
const BOOT: Duration = Duration::from_mins(3);
/// How long a command may take that is waited for without saying how long.
const PATIENCE: Duration = Duration::from_mins(2);
const MEMORY: &str = "1024";
const PROCESSORS: &str = "2";

/// Two processors that have all that the emulator can do, and clocks that programs read without a system call.
const PROCESSOR: &str = "max,la57=off";
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable";

/// A running machine.
pub struct Machine {
    /// What the test calls it; also its host name.
    pub name: String,
    /// From start to the agent's first word.
    pub boot_time: Duration,
    qemu: Child,
    console: PathBuf,
    port: UnixStream,
    known: Arc<Known>,
    next: Cell<u64>,
}

/// What a machine has said.
#[derive(Default)]
struct Known {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ready: bool,
    gone: bool,
    commands: HashMap<u64, Progress>,
}

#[derive(Default)]
struct Progress {
    out: String,
    err: String,
    ended: bool,
    /// Its exit status, once it has ended; none where a signal ended it.
    status: Option<i32>,
}

impl Known {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `look` finds something.
    fn wait<T>(
        &self,
        what: &str,
        patience: Duration,
        mut look: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            if let Some(found) = look(&mut state) {
                return Ok(found);
            }
            ensure!(!state.gone, "{what}: the machine is gone");
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "{what}: not within {patience:?}");
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn take(&self, event: Event) {
        let mut state = self.lock();
        match event {
            Event::Ready => state.ready = true,
            Event::Output { id, stream, line } => {
                let progress = state.commands.entry(id).or_default();
                match stream {
                    Stream::Out => progress.out.push_str(&line),
                    Stream::Err => progress.err.push_str(&line),
                }
            }
            Event::Ended { id, status } => {
                let progress = state.commands.entry(id).or_default();
                (progress.ended, progress.status) = (true, status);
            }
        }
        self.changed.notify_all();
    }

    fn follow(&self, port: UnixStream) {
        for line in BufReader::new(port).lines().map_while(Result::ok) {
            match serde_json::from_str(&line) {
                Ok(event) => self.take(event),
                // The agent is of the same build; if it is mad, it is as good as gone.
                Err(_) => break,
            }
        }
        self.lock().gone = true;
        self.changed.notify_all();
    }
}

impl Machine {
    /// Boots a machine without a network.
    pub fn boot(sandbox: &Sandbox, kernel: &Kernel) -> Result<Self> {
        Self::start(sandbox, "alone", kernel, None)
    }

    /// Boots a machine with a network card.
    pub fn boot_with_card(sandbox: &Sandbox, kernel: &Kernel, card: &Card) -> Result<Self> {
        Self::start(sandbox, card.name(), kernel, Some(card))
    }

    fn start(sandbox: &Sandbox, name: &str, kernel: &Kernel, card: Option<&Card>) -> Result<Self> {
        let initramfs = sandbox.path(&format!("initramfs-{}", kernel.release));
        if !initramfs.exists() {
            initramfs::write(kernel, &initramfs)?;
        }
        let (console, socket) =
            (sandbox.path(&format!("{name}.console")), sandbox.path(&format!("{name}.port")));
        let listener =
            UnixListener::bind(&socket).with_context(|| format!("binding {}", socket.display()))?;
        let begun = Instant::now();
        let mut qemu = qemu(kernel, &initramfs, &console, &socket)
            .args(card.map(Card::options).unwrap_or_default())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(sandbox.path(&format!("{name}.qemu")))?)
            .spawn()
            .context("starting qemu-system-x86_64: is it installed? (scripts/ensure-packages vm)")?;
        let port = accept(&listener, &mut qemu, &sandbox.path(&format!("{name}.qemu")));
        // The name has done its work; another machine may be called the same later.
        fs::remove_file(&socket)?;
        let port = match port {
            Ok(port) => port,
            Err(error) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                return Err(error);
            }
        };
        let known = Arc::new(Known::default());
        let (follower, stream) = (Arc::clone(&known), port.try_clone()?);
        std::thread::spawn(move || follower.follow(stream));
        let name = name.to_owned();
        let mut machine =
            Self { name, boot_time: Duration::ZERO, qemu, console, port, known, next: Cell::new(0) };
        machine.prepare(kernel, card, begun).with_context(|| machine.last_words())?;
        Ok(machine)
    }

    fn prepare(&mut self, kernel: &Kernel, card: Option<&Card>, begun: Instant) -> Result<()> {
        let what = format!("machine {} booting {}", self.name, kernel.release);
        self.known.wait(&what, BOOT, |state| state.ready.then_some(()))?;
        self.boot_time = begun.elapsed();
        println!("{what}: {:.1} s", self.boot_time.as_secs_f64());
        self.run(["hostname", &self.name])?.success("hostname")?;
        self.run(["ip", "link", "set", "lo", "up"])?.success("ip link")?;
        if let Some(card) = card {
            self.run(["sh", "-ec", &card.script()])?.success("setting the network up")?;
        }
        Ok(())
    }

    /// Starts a command.
    pub fn begin<S: Into<String>>(&self, command: impl IntoIterator<Item = S>) -> Result<Running<'_>> {
        let id = self.next.get();
        self.next.set(id + 1);
        let command: Vec<String> = command.into_iter().map(Into::into).collect();
        let what = format!("{} on {}", command.join(" "), self.name);
        self.known.lock().commands.insert(id, Progress::default());
        self.send(&Request::Start { id, command })?;
        Ok(Running { machine: self, id, what })
    }

    /// Runs a command to its end.
    pub fn run<S: Into<String>>(&self, command: impl IntoIterator<Item = S>) -> Result<Said> {
        self.begin(command)?.end(PATIENCE)
    }

    /// The files that a command or a script of the machine's shell lists, reads, computes: its standard output.
    pub fn shell(&self, script: &str) -> Result<String> {
        Ok(self.run(["sh", "-ec", script])?.success(script)?.out)
    }

    /// Cuts its power.
    pub fn kill(mut self) -> Result<()> {
        self.qemu.kill().context("killing qemu")?;
        self.qemu.wait()?;
        Ok(())
    }

    /// The end of what the kernel and process 1 wrote to the console.
    pub fn last_words(&self) -> String {
        let text = fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(40)..].join("\n");
        format!("the console of machine {} ends:\n{end}", self.name)
    }

    fn send(&self, request: &Request) -> Result<()> {
        let line = encode(request)?;
        (&self.port).write_all(&line).with_context(|| format!("talking to machine {}", self.name))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn qemu(kernel: &Kernel, initramfs: &Path, console: &Path, socket: &Path) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35"])
        .args(["-accel", "tcg,thread=multi", "-cpu", PROCESSOR, "-smp", PROCESSORS, "-m", MEMORY])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", COMMAND_LINE])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"])
        .arg("-chardev")
        .arg(format!("socket,id=port,path={}", socket.display()))
        .arg("-device")
        .arg(format!("virtserialport,chardev=port,name={PORT}"));
    qemu
}

/// The connection that qemu makes at its start.
fn accept(listener: &UnixListener, qemu: &mut Child, log: &Path) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let stream = wait_for("qemu starting", Duration::from_secs(30), || {
        if let Some(status) = qemu.try_wait()? {
            bail!("qemu ended: {status}: {}", fs::read_to_string(log)?);
        }
        Ok(listener.accept().ok())
    })?;
    stream.0.set_nonblocking(false)?;
    Ok(stream.0)
}

/// A command that runs in a machine. Dropped, it runs on.
pub struct Running<'machine> {
    machine: &'machine Machine,
    id: u64,
    what: String,
}

impl Running<'_> {
    /// Waits for its end.
    pub fn end(self, patience: Duration) -> Result<Said> {
        let ended = self.machine.known.wait(&self.what, patience, |state| {
            let progress = state.commands.get_mut(&self.id).filter(|progress| progress.ended)?;
            let (out, err) = (std::mem::take(&mut progress.out), std::mem::take(&mut progress.err));
            Some(Said { status: progress.status, out, err })
        });
        ended.with_context(|| {
            let state = self.machine.known.lock();
            let so_far =
                state.commands.get(&self.id).map(|progress| format!("{}{}", progress.out, progress.err));
            drop(state);
            format!("so far:\n{}\n{}", so_far.unwrap_or_default(), self.machine.last_words())
        })
    }

    /// Waits until `look` finds something in its standard output.
    pub fn out<T>(&self, patience: Duration, look: impl Fn(&str) -> Option<T>) -> Result<T> {
        self.look(patience, |progress| look(&progress.out))
    }

    /// Waits until `look` finds something in its standard error.
    pub fn err<T>(&self, patience: Duration, look: impl Fn(&str) -> Option<T>) -> Result<T> {
        self.look(patience, |progress| look(&progress.err))
    }

    fn look<T>(&self, patience: Duration, look: impl Fn(&Progress) -> Option<T>) -> Result<T> {
        let found = self.machine.known.wait(&self.what, patience, |state| {
            let progress = state.commands.get(&self.id)?;
            match look(progress) {
                Some(found) => Some(Ok(found)),
                None if progress.ended => Some(Err(format!("{}{}", progress.out, progress.err))),
                None => None,
            }
        })?;
        found.map_err(|said| anyhow::anyhow!("{} ended before: {said}", self.what))
    }

    /// Kills it.
    pub fn kill(&self) -> Result<()> {
        self.machine.send(&Request::Kill { id: self.id })
    }
}
