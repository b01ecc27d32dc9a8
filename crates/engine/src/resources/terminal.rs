//! Pseudo-terminals (pty(7)): both ends, the settings, and the session that a terminal controls.
//!
//! A terminal is rebuilt with its number in the `/dev/pts` of the tree's root, before any process is born: whoever
//! leads a session takes its controlling terminal right after setsid(2), so that its children inherit it.
//!
//! What a slave has written and nobody has read yet travels, up to the 4,095 bytes that a terminal keeps ready; with
//! more the checkpoint is refused. So it is when a slave has input that its program could read. Input of a line that
//! is not finished (canonical mode) does not travel: the kernel shows it to nobody. `/dev/tty` comes back as the
//! terminal that it stood for. Output that is stopped by `^S` goes on.
//!
//! A terminal whose master is outside the tree, as that of a job of a shell, is carried if the caller names it
//! (`--external`): the restored processes get the terminal that the caller of the restore names, with the settings of
//! the former. Only a session of the tree's own would have it as controlling terminal; that it loses.
//!
//! The terminal of a container (`limosa run --tty`) is kept outside of it, too, but for it: it comes back with its number,
//! size, settings and session, and whoever restores gets the master. What its programs have written is read where it was
//! kept before, so nothing of that travels.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use limosa_kernel::proc::FdExtra;
use limosa_kernel::terminal::{self, QUEUE, Settings, Size};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::{Deserialize, Serialize};

use super::{CaptureContext, DescriptorKind, RebuildContext, file};
use crate::error::{CaptureError, RestoreError};
use crate::view::{DescriptionView, ProcessView};

/// Major device numbers: of slaves, and of `/dev/tty` and `/dev/ptmx` (minor 0 and 2).
const SLAVES: u32 = 136;
const OTHERS: u32 = 5;
/// The settings that a line discipline other than N_TTY would need are its own.
const N_TTY: u8 = 0;

/// A pseudo-terminal.
#[derive(Debug, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of the kernel's own")]
pub struct Terminal {
    /// The N of `/dev/pts/N`.
    pub index: u32,
    /// `c_iflag`, `c_oflag`, `c_cflag`, `c_lflag`, speed of input and of output.
    pub modes: [u32; 6],
    /// `c_cc`
    pub characters: [u8; 19],
    /// Rows, columns, and pixels in both directions.
    pub size: [u16; 4],
    /// Whether the master reads packets.
    pub packet_mode: bool,
    /// Whether the slave cannot be opened.
    pub locked: bool,
    /// Whether only root may open the slave again.
    pub exclusive: bool,
    /// Mode, user and group of `/dev/pts/N`, where the slave is open.
    pub slave: Option<(u32, u32, u32)>,
    /// Whether the slave has been closed by all, which the master sees as a hang-up.
    pub hung_up: bool,
    /// What the master could read.
    pub queue: serde_bytes::ByteBuf,
    /// The session that it controls, if that is in the tree.
    pub session: Option<i32>,
    /// The process group in the foreground.
    pub foreground: Option<i32>,
    /// Whether the master is kept outside the tree, for it.
    #[serde(default)]
    pub kept: bool,
}

/// A descriptor of a pseudo-terminal.
#[derive(Debug, Serialize, Deserialize)]
pub struct TerminalEnd {
    /// Index into the tree's terminals.
    pub terminal: usize,
    /// Whether it is the master.
    pub master: bool,
    /// The terminal that it is, if somebody outside the tree shows it.
    #[serde(default)]
    pub external: Option<External>,
}

/// A terminal that somebody outside the tree shows. Restore is told which one takes its place.
#[derive(Debug, Serialize, Deserialize)]
pub struct External {
    /// Its key.
    pub key: String,
    /// As in [`Terminal`].
    pub modes: [u32; 6],
    /// As in [`Terminal`].
    pub characters: [u8; 19],
}

/// The terminals of a tree while it is captured.
#[derive(Debug, Default)]
pub struct Terminals {
    /// The number of the one whose master is kept outside, for the tree.
    pub kept: Option<u32>,
    by_index: HashMap<u32, usize>,
    found: Vec<Terminal>,
}

/// The terminal's number, and whether the descriptor is its master.
fn end_of(view: &DescriptionView) -> Option<Result<(u32, bool), CaptureError>> {
    // An O_PATH descriptor is no terminal.
    if view.is_path() {
        return None;
    }
    let device = (rustix::fs::major(view.stat.st_rdev), rustix::fs::minor(view.stat.st_rdev));
    if rustix::fs::FileType::from_raw_mode(view.stat.st_mode) != rustix::fs::FileType::CharacterDevice {
        return None;
    }
    match (device, &view.info.extra) {
        (_, FdExtra::PtyMaster { index }) => Some(Ok((*index, true))),
        ((SLAVES, index), _) => Some(Ok((index, false))),
        ((OTHERS, 0), _) => Some(match terminal::device(&view.descriptor) {
            Ok((SLAVES, index)) => Ok((index, false)),
            Ok(_) => Err(outside(view)),
            Err(error) => Err(error.into()),
        }),
        _ => None,
    }
}

fn outside(view: &DescriptionView) -> CaptureError {
    let remedy = "name it with --external tty=/dev/pts/N here and at the restore, redirect it to files, or checkpoint \
        the terminal multiplexer that it runs in";
    view.refuse("whoever shows this terminal is not in the tree", remedy).into()
}

impl DescriptorKind for TerminalEnd {
    fn recognise(view: &DescriptionView) -> bool {
        end_of(view).is_some()
    }

    fn capture(view: &DescriptionView, context: &mut CaptureContext) -> Result<Self, CaptureError> {
        let (index, master) = match end_of(view) {
            Some(end) => end?,
            None => return Err(outside(view)),
        };
        if let Some(key) = is_external(view, index, context) {
            let settings = terminal::settings(&view.descriptor)?;
            let external = Some(External { key, modes: modes(settings), characters: settings.characters });
            return Ok(Self { terminal: 0, master: false, external });
        }
        let terminal = match context.terminals.by_index.get(&index) {
            Some(known) => *known,
            None => {
                let state = Terminal::capture(index, view, context)?;
                let terminal = context.terminals.found.len();
                context.terminals.by_index.insert(index, terminal);
                context.terminals.found.push(state);
                terminal
            }
        };
        Ok(Self { terminal, master, external: None })
    }

    fn examine(view: &DescriptionView, context: &mut CaptureContext) -> Result<(), CaptureError> {
        let (index, _) = end_of(view).ok_or_else(|| outside(view))??;
        if is_external(view, index, context).is_some() {
            return Ok(());
        }
        let ends = Ends::find(index, view, context)?;
        check_line(ends.any)?;
        ends.check_queue().map(drop)
    }

    fn rebuild(&self, flags: u32, context: &mut RebuildContext) -> Result<OwnedFd, RestoreError> {
        if let Some(external) = &self.external {
            return external.open(flags, context);
        }
        let missing = || RestoreError::inconsistent(format!("there is no terminal {}", self.terminal));
        let terminal = context.terminals.get(self.terminal).ok_or_else(missing)?;
        if self.master {
            return terminal.master.try_clone().map_err(|source| RestoreError::Rebuild {
                object: "terminal".into(),
                step: "dup",
                source,
            });
        }
        Ok(terminal::open_slave(&terminal.master, opening_flags(flags).bits() as i32)?)
    }
}

fn opening_flags(flags: u32) -> OFlags {
    let kept = OFlags::from_bits_retain(flags) & (OFlags::ACCMODE | OFlags::NONBLOCK);
    kept | OFlags::NOCTTY | OFlags::CLOEXEC
}

/// The key of a terminal that is shown outside the tree: by the descriptor's file, or, where that is `/dev/tty`, by
/// the terminal that it stands for.
fn external_key(view: &DescriptionView, index: u32, context: &CaptureContext) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let key = |device, inode| context.externals.get(&(device, inode)).cloned();
    key(view.stat.st_dev, view.stat.st_ino).or_else(|| {
        let node = std::fs::metadata(format!("/proc/{}/root/dev/pts/{index}", view.process.pid)).ok()?;
        key(node.dev(), node.ino())
    })
}

impl External {
    /// Opens the terminal that takes its place, and gives it its settings.
    fn open(&self, flags: u32, context: &RebuildContext) -> Result<OwnedFd, RestoreError> {
        let terminal = file::open_external(&self.key, opening_flags(flags), context)?;
        if !rustix::termios::isatty(&terminal) {
            let (path, reason) = (format!("external file {}", self.key), "it is not a terminal".into());
            return Err(RestoreError::File { path, reason });
        }
        // Not from the background: the kernel would stop Limosa for it (SIGTTOU).
        let foreground = rustix::termios::tcgetpgrp(&terminal);
        if foreground.is_ok_and(|group| group != rustix::process::getpgrp()) {
            tracing::warn!("the settings of a terminal are left as they are: another process group is in its foreground");
            return Ok(terminal);
        }
        terminal::set_settings(&terminal, settings(self.modes, self.characters))?;
        Ok(terminal)
    }
}

/// `c_iflag`, `c_oflag`, `c_cflag`, `c_lflag`, speed of input and of output.
fn modes(settings: Settings) -> [u32; 6] {
    let Settings { input, output, control, local, input_speed, output_speed, .. } = settings;
    [input, output, control, local, input_speed, output_speed]
}

fn settings(modes: [u32; 6], characters: [u8; 19]) -> Settings {
    let [input, output, control, local, input_speed, output_speed] = modes;
    Settings { input, output, control, local, line: N_TTY, characters, input_speed, output_speed }
}

impl Terminal {
    /// Captures the terminal that `view` is an end of.
    fn capture(index: u32, view: &DescriptionView, context: &CaptureContext) -> Result<Self, CaptureError> {
        let ends = Ends::find(index, view, context)?;
        let Ends { any, master, slave } = ends;
        let settings = check_line(any)?;
        let Size { rows, columns, width, height } = terminal::size(&any.descriptor)?;
        let of_master = |look: fn(&OwnedFd) -> limosa_kernel::Result<bool>| {
            Ok::<_, CaptureError>(master.map(|master| look(&master.descriptor)).transpose()?.unwrap_or(false))
        };
        let node = slave.filter(|slave| rustix::fs::major(slave.stat.st_rdev) == SLAVES);
        Ok(Self {
            index,
            modes: modes(settings),
            characters: settings.characters,
            size: [rows, columns, width, height],
            packet_mode: of_master(|master| terminal::packet_mode(master))?,
            locked: of_master(|master| terminal::is_locked(master))?,
            exclusive: slave.map(|slave| terminal::is_exclusive(&slave.descriptor)).transpose()?.unwrap_or(false),
            slave: node.map(|node| (node.stat.st_mode & 0o7777, node.stat.st_uid, node.stat.st_gid)),
            hung_up: master.map(poll).transpose()?.is_some_and(|polled| polled.contains(PollFlags::HUP)),
            queue: ends.queue()?.into(),
            session: None,
            foreground: None,
            kept: master.is_none(),
        })
    }
}

fn poll(view: &DescriptionView) -> Result<PollFlags, CaptureError> {
    let mut polled = [PollFd::new(&view.descriptor, PollFlags::IN | PollFlags::PRI)];
    rustix::event::poll(&mut polled, Some(&Timespec::default())).map_err(view.error("poll of a terminal"))?;
    Ok(polled[0].revents())
}

/// The ends of a terminal that are open in the tree.
struct Ends<'a> {
    /// One that there is: the master, or the slave of a terminal whose master is kept outside for the tree.
    any: &'a DescriptionView<'a>,
    master: Option<&'a DescriptionView<'a>>,
    slave: Option<&'a DescriptionView<'a>>,
}

impl<'a> Ends<'a> {
    fn find(index: u32, view: &DescriptionView, context: &CaptureContext<'a>) -> Result<Self, CaptureError> {
        let descriptions = context.descriptions;
        let of = |master| {
            descriptions.iter().filter(move |other| matches!(end_of(other), Some(Ok(end)) if end == (index, master)))
        };
        let (mut masters, slave) = (of(true), of(false).next());
        let master = masters.next();
        if masters.next().is_some() {
            let reason = format!("the tree has two terminals with the number {index}, of two /dev/pts");
            return Err(view.refuse(reason, "close one of them").into());
        }
        let kept = slave.filter(|_| context.terminals.kept == Some(index));
        let any = master.or(kept).ok_or_else(|| outside(view))?;
        if master.is_none() && poll(any)?.contains(PollFlags::HUP) {
            let reason = "whoever kept the container's terminal has closed it (it hung up)";
            let remedy = "close it; what is to outlive its terminal is best run with --detach";
            return Err(view.refuse(reason, remedy).into());
        }
        Ok(Self { any, master, slave })
    }

    /// A refusal where more waits than can be carried.
    fn check_queue(&self) -> Result<(), CaptureError> {
        if let Some(slave) = self.slave
            && terminal::waiting(&slave.descriptor)? > 0
        {
            let reason = "its program has not yet read what was typed";
            return Err(slave.refuse(reason, "try again when it has").into());
        }
        let Some(master) = self.master else { return Ok(()) };
        let waiting = terminal::waiting(&master.descriptor)?;
        if waiting >= QUEUE || poll(master)?.contains(PollFlags::PRI) {
            let reason = format!("{waiting} bytes or a change of its state wait to be read from it");
            return Err(master.refuse(reason, "try again when the program that shows it has read them").into());
        }
        Ok(())
    }

    /// What the master could read. If it is kept outside, it does.
    fn queue(&self) -> Result<Vec<u8>, CaptureError> {
        self.check_queue()?;
        Ok(self.master.map_or(Ok(Vec::new()), |master| terminal::copy_waiting(&master.descriptor))?)
    }
}

/// The settings, if its line discipline is the one that terminals have.
fn check_line(master: &DescriptionView) -> Result<Settings, CaptureError> {
    let settings = terminal::settings(&master.descriptor)?;
    if settings.line != N_TTY {
        let reason = format!("it has line discipline {}", settings.line);
        return Err(master.refuse(reason, "set it back to 0 (N_TTY)").into());
    }
    Ok(settings)
}

/// The key of a terminal that is shown outside the tree.
fn is_external(view: &DescriptionView, index: u32, context: &CaptureContext) -> Option<String> {
    if context.terminals.kept == Some(index) {
        return None;
    }
    let shown = |other: &DescriptionView| matches!(end_of(other), Some(Ok(end)) if end == (index, true));
    if context.descriptions.iter().any(shown) { None } else { external_key(view, index, context) }
}

impl Terminals {
    /// The terminals, with the sessions that they control.
    pub fn finish(mut self, views: &[ProcessView]) -> Vec<Terminal> {
        for view in views {
            let Some((_, index)) = view.stat.tty().filter(|(major, _)| *major == SLAVES) else { continue };
            let leads = view.status.ns_sid.last() == Some(&view.own_pid);
            let Some(terminal) = self.by_index.get(&index).and_then(|known| self.found.get_mut(*known)) else {
                // Others have that of the session which they come back in.
                if leads {
                    tracing::warn!(pid = view.pid, index, "its session's terminal is not in the tree and will be missing");
                }
                continue;
            };
            if leads {
                terminal.session = Some(view.own_pid);
                let member = views.iter().find(|member| member.stat.pgrp == view.stat.tpgid);
                terminal.foreground = member.and_then(|member| member.status.ns_pgid.last().copied());
            }
        }
        self.found
    }
}

/// A terminal that exists again.
#[derive(Debug)]
pub(crate) struct Rebuilt {
    pub(crate) master: OwnedFd,
    /// Kept until the tree has its own descriptors, if it has any or had.
    pub(crate) slave: Option<OwnedFd>,
}

/// The master of the terminal that is kept outside the tree, for whoever restores it.
pub(crate) fn kept(terminals: &[Terminal], rebuilt: Vec<Rebuilt>) -> Option<OwnedFd> {
    let mut pairs = terminals.iter().zip(rebuilt);
    pairs.find(|(terminal, _)| terminal.kept).map(|(_, rebuilt)| rebuilt.master)
}

/// Makes all terminals again in the `/dev/pts` of `root`.
pub(crate) fn rebuild_all(terminals: &[Terminal], root: &OwnedFd) -> Result<Vec<Rebuilt>, RestoreError> {
    terminals.iter().map(|terminal| terminal.rebuild(root)).collect()
}

impl Terminal {
    fn rebuild(&self, root: &OwnedFd) -> Result<Rebuilt, RestoreError> {
        let master = open_master(root, self.index)?;
        terminal::set_locked(&master, false)?;
        let flags = (OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC).bits() as i32;
        let needed = self.slave.is_some() || self.session.is_some() || self.hung_up;
        let slave = if needed { Some(terminal::open_slave(&master, flags)?) } else { None };
        terminal::set_settings(&master, settings(self.modes, self.characters))?;
        let [rows, columns, width, height] = self.size;
        terminal::set_size(&master, Size { rows, columns, width, height })?;
        if let (Some(slave), Some((mode, user, group))) = (&slave, self.slave) {
            let fail = |step| RestoreError::rebuild(format!("terminal {}", self.index), step);
            let (user, group) = (rustix::fs::Uid::from_raw(user), rustix::fs::Gid::from_raw(group));
            rustix::fs::fchown(slave, Some(user), Some(group)).map_err(fail("fchown"))?;
            rustix::fs::fchmod(slave, Mode::from_raw_mode(mode)).map_err(fail("fchmod"))?;
        }
        Ok(Rebuilt { master, slave })
    }

    /// What comes after all descriptors have been opened.
    pub(crate) fn complete(&self, rebuilt: &Rebuilt) -> Result<(), RestoreError> {
        if let Some(slave) = rebuilt.slave.as_ref().filter(|_| self.exclusive) {
            terminal::set_exclusive(slave)?;
        }
        terminal::set_packet_mode(&rebuilt.master, self.packet_mode)?;
        terminal::set_locked(&rebuilt.master, self.locked)?;
        if self.queue.len() > QUEUE {
            return Err(RestoreError::inconsistent(format!("{} bytes wait in a terminal", self.queue.len())));
        }
        Ok(terminal::put_in(&rebuilt.master, &self.queue)?)
    }
}

/// Opens masters until one has the number: the kernel gives out the lowest that is free.
fn open_master(root: &OwnedFd, index: u32) -> Result<OwnedFd, RestoreError> {
    let mut lower = Vec::new();
    loop {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let master =
            rustix::fs::openat2(root, c"/dev/ptmx", flags, Mode::empty(), ResolveFlags::IN_ROOT).map_err(
                |errno| RestoreError::File {
                    path: "/dev/ptmx".into(),
                    reason: std::io::Error::from(errno).to_string(),
                },
            )?;
        let got = terminal::index(&master)?;
        if got == index {
            return Ok(master);
        }
        if got > index {
            return Err(RestoreError::Unsupported {
                what: format!("terminal /dev/pts/{index}"),
                why: "the number is taken here; end the session that uses it".into(),
            });
        }
        lower.push(master);
    }
}
