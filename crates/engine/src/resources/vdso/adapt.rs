//! A process whose vDSO is not this kernel's.
//!
//! The C library has looked up the vDSO's functions when the program started, and calls them by pointers that lie
//! anywhere. So the old code comes back where it was, as ordinary memory, its *face*: ELF headers, symbols and
//! unwinding tables as they were, and at the entry of each function a jump to the function of that name in this
//! kernel's vDSO, which is mapped in a free place. For a function that this kernel does not have, the entry holds the
//! plain system call. The auxiliary vector (`AT_SYSINFO_EHDR`) still says where the face is.
//!
//! ```text
//!   before     [data][code of kernel A]
//!   on B              [face of A] ──jumps──► [data][code of kernel B]
//!   on C              [face of A] ──jumps──────────────────────► [data][code of kernel C]
//!   on A again [data][code of kernel A]
//! ```
//!
//! Only the face knows where B's code is, so C's takes its place and the face's jumps are written anew: chains do not
//! grow. Where this kernel's vDSO differs from the face in nothing but code, it takes the face's own place, if that
//! is free with the data below it: on the first kernel again, or on the same kernel with another processor.
//!
//! What cannot be adapted is a thread in the middle of old code, whose data is gone; a freeze has threads leave
//! it ([`crate::freeze`]). One that has not, or a signal handler that will return there, is refused.
//!
//! State of the vDSO's `getrandom` that a C library holds needs nothing: that function takes only state of the size
//! that it has given itself, and makes the system call otherwise; and memory of such state (`MAP_DROPPABLE`) comes
//! back as zeros, which it takes for dropped.

use std::ops::Range;

use limosa_image::Checkpoint;
use limosa_puppet::arch::redirect;
use limosa_puppet::{VdsoFunction, VdsoImage};

use super::super::mapping::{Backing, MappingState};
use super::place::free_place;
use super::{AT_SYSINFO_EHDR, Own, VdsoState, digest, mapping_at, own};
use crate::error::RestoreError;
use crate::memory;
use crate::state::{Body, Life, Thread, Tree};

/// A mapping larger than this is no vDSO.
const LARGEST: u64 = 1 << 20;
/// How much of a stack is searched for signal frames.
const STACK_SEARCHED: u64 = 8 << 20;

/// What has to be done to a process beyond its mappings, so that it gets along with this kernel's vDSO.
#[derive(Debug, Default)]
pub struct Adaptation {
    /// Bytes to be written at addresses after all stored pages.
    pub patches: Vec<(u64, Vec<u8>)>,
    /// Addresses whose stored pages are not needed any more: the first, and the first behind them.
    pub left_out: Option<(u64, u64)>,
}

impl Adaptation {
    /// Whether there is anything to be done.
    pub(crate) fn is_needed(&self) -> bool {
        !self.patches.is_empty() || self.left_out.is_some()
    }

    /// Whether anything is to be written into the mapping.
    pub(crate) fn touches(&self, mapping: &MappingState) -> bool {
        self.patches.iter().any(|(address, _)| (mapping.start..mapping.end()).contains(address))
    }
}

/// Adapts all processes of the tree to the vDSO of the kernel that Limosa runs on.
pub fn adapt(tree: &mut Tree, checkpoint: &Checkpoint) -> Result<(), RestoreError> {
    let vdso = tree.vdso.as_ref();
    for process in &mut tree.processes {
        if let Life::Alive(body) = &mut process.life {
            adapt_process(process.pid, body, vdso, checkpoint)?;
        }
    }
    Ok(())
}

fn unsupported(what: impl Into<String>, why: impl Into<String>) -> RestoreError {
    RestoreError::Unsupported { what: what.into(), why: why.into() }
}

fn adapt_process(
    pid: i32,
    body: &mut Body,
    vdso: Option<&VdsoState>,
    checkpoint: &Checkpoint,
) -> Result<(), RestoreError> {
    let mut parts = body.mappings.iter().enumerate().filter_map(|(index, mapping)| match mapping.backing {
        Backing::Vdso(digest) => Some((index, digest)),
        _ => None,
    });
    let Some((index, old_digest)) = parts.next() else { return Ok(()) };
    if parts.next().is_some() {
        return Err(unsupported(format!("the vDSO of process {pid}"), "the process has taken it apart"));
    }
    let Some(own) = own()? else {
        return Err(unsupported("a vDSO", "this kernel runs without one; boot it without vdso=0"));
    };
    if old_digest == own.state.digest {
        let whole = body.mappings[index].length == own.length();
        return whole.then_some(()).ok_or_else(|| RestoreError::inconsistent("a vDSO of a wrong size"));
    }
    let Some(vdso) = vdso.filter(|vdso| vdso.digest == old_digest) else {
        let why = "this kernel has another one, and the checkpoint is of a Limosa that did not store it yet; restore \
                   on the kernel version of the checkpoint";
        return Err(unsupported("the vDSO of the checkpoint", why));
    };
    let gone = body.mappings.remove(index);
    let face = match standing_face(body, &gone, vdso, checkpoint)? {
        Some(face) => face,
        None => Face::of(&gone, vdso)?,
    };
    refuse_inside(body, &gone, &face, checkpoint)?;
    if face.is_like(own)
        && let Some(start) = face.place_of(own, &body.mappings)
    {
        body.mappings.retain(|mapping| mapping.start != face.range.start);
        body.vdso.left_out = Some((face.range.start, face.range.end));
        insert(&mut body.mappings, mapping_at(start, own));
        return Ok(());
    }
    if face.is_new {
        insert(&mut body.mappings, face.mapping());
    }
    let heap_end = body.state.address_space.heap_end();
    let Some(start) = free_place(&body.mappings, face.range.start, own.length(), heap_end) else {
        return Err(unsupported(
            format!("process {pid}"),
            "its address space has no room for this kernel's vDSO",
        ));
    };
    insert(&mut body.mappings, mapping_at(start, own));
    body.vdso.patches = face.patches(start + own.data_length, own)?;
    Ok(())
}

fn insert(mappings: &mut Vec<MappingState>, mapping: MappingState) {
    let at = mappings.partition_point(|other| other.start < mapping.start);
    mappings.insert(at, mapping);
}

/// The code of a vDSO that pointers of the process refer to.
struct Face {
    range: Range<u64>,
    /// As long as its ELF headers say.
    image: Vec<u8>,
    vdso: VdsoImage,
    /// Whether the process comes from the kernel whose vDSO this is, and has no memory there yet.
    is_new: bool,
}

impl Face {
    /// The vDSO that the process was checkpointed with.
    fn of(gone: &MappingState, vdso: &VdsoState) -> Result<Self, RestoreError> {
        let wrong = || RestoreError::inconsistent("its vDSO is none");
        let start =
            gone.end().checked_sub(vdso.length).filter(|start| *start >= gone.start).ok_or_else(wrong)?;
        let fits = vdso.length.is_multiple_of(4096)
            && vdso.length <= LARGEST
            && vdso.image.len() as u64 <= vdso.length;
        if !fits || digest(&vdso.image) != vdso.digest {
            return Err(wrong());
        }
        let parsed = VdsoImage::parse(&vdso.image).ok_or_else(wrong)?;
        Ok(Self { range: start..gone.end(), image: vdso.image.clone(), vdso: parsed, is_new: true })
    }

    /// The mapping of a new one. Its name is for people who look at the process.
    fn mapping(&self) -> MappingState {
        let Range { start, end } = self.range;
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        MappingState {
            name: Some(b"old vdso".to_vec().into()),
            ..MappingState::plain(start, end - start, protection, Backing::Anonymous)
        }
    }

    /// Whether this kernel's vDSO differs in nothing but code: what is not code (where the functions begin, and what
    /// a dynamic linker remembers of it) is the same.
    fn is_like(&self, own: &Own) -> bool {
        let image = &own.state.image;
        image.len() == self.image.len()
            && VdsoImage::parse(image).is_some_and(|vdso| vdso.code == self.vdso.code)
            && image
                .iter()
                .zip(&self.image)
                .enumerate()
                .all(|(at, (new, old))| new == old || self.vdso.code.iter().any(|code| code.contains(&at)))
    }

    /// Where this kernel's vDSO has to be mapped so that its code is in this place, if nothing else is there.
    fn place_of(&self, own: &Own, mappings: &[MappingState]) -> Option<u64> {
        let start = self.range.start.checked_sub(own.data_length)?;
        let end = self.range.start.checked_add(own.state.length)?;
        let others = mappings.iter().filter(|mapping| mapping.start != self.range.start);
        others.into_iter().all(|mapping| mapping.end() <= start || end <= mapping.start).then_some(start)
    }

    /// What is to be written so that all functions lead to those of this kernel, whose code will be at `code`.
    fn patches(&self, code: u64, own: &Own) -> Result<Vec<(u64, Vec<u8>)>, RestoreError> {
        let known = VdsoImage::parse(&own.state.image)
            .ok_or_else(|| unsupported("a vDSO", "this kernel's is not understood"))?;
        let mut image = self.image.clone();
        let mut entries = Vec::with_capacity(self.vdso.functions.len());
        for function in &self.vdso.functions {
            let lead = match known.offset_of(&function.name) {
                Some(offset) => redirect::jump(code + offset as u64),
                None => redirect::stand_in(&function.name).ok_or_else(|| {
                    let what = format!("the vDSO's function {:?}", function.name);
                    unsupported(
                        what,
                        "neither this kernel nor Limosa knows it; restore on the kernel version of the \
                                       checkpoint",
                    )
                })?,
            };
            let room = image.get_mut(function.offset..).and_then(|rest| rest.get_mut(..function.room));
            let entry = room.and_then(|room| room.get_mut(..lead.len())).ok_or_else(|| {
                RestoreError::inconsistent(format!("its vDSO's function {:?} is too small", function.name))
            })?;
            entry.copy_from_slice(&lead);
            entries.push((self.range.start + function.offset as u64, lead));
        }
        Ok(if self.is_new { vec![(self.range.start, image)] } else { entries })
    }

    /// Whether a thread may stand here: outside, or at the first instruction of a function.
    fn may_stand(&self, address: u64) -> bool {
        !self.range.contains(&address)
            || self.vdso.functions.iter().any(|function| self.range.start + function.offset as u64 == address)
    }
}

/// The face that an earlier restore on another kernel gave the process, if it leads to the vDSO that is `gone`.
fn standing_face(
    body: &Body,
    gone: &MappingState,
    vdso: &VdsoState,
    checkpoint: &Checkpoint,
) -> Result<Option<Face>, RestoreError> {
    let auxv = &body.state.address_space.auxv;
    let start = auxv.iter().find(|(kind, _)| *kind == AT_SYSINFO_EHDR).map_or(0, |(_, value)| *value);
    let executable = (libc::PROT_READ | libc::PROT_EXEC) as u32;
    let Some(mapping) = body.mappings.iter().find(|mapping| {
        mapping.start == start
            && matches!(mapping.backing, Backing::Anonymous)
            && mapping.protection == executable
            && mapping.length <= LARGEST
    }) else {
        return Ok(None);
    };
    let mut image = vec![0; mapping.length as usize];
    memory::read_stored(checkpoint, &body.pages, (start, mapping.end()), |at, bytes| {
        image[(at - start) as usize..][..bytes.len()].copy_from_slice(bytes);
    })?;
    image.truncate(limosa_puppet::elf_extent(&image).unwrap_or(0));
    let Some(parsed) = VdsoImage::parse(&image) else { return Ok(None) };
    let code = gone.end().saturating_sub(vdso.length)..gone.end();
    let leads = |function: &VdsoFunction| {
        let entry = &image[function.offset..];
        redirect::jump_target(entry).is_some_and(|target| code.contains(&target))
            || redirect::stand_in(&function.name).is_some_and(|stand_in| entry.starts_with(&stand_in))
    };
    let is_one = !parsed.functions.is_empty() && parsed.functions.iter().all(leads);
    Ok(is_one.then(|| Face { range: start..mapping.end(), image, vdso: parsed, is_new: false }))
}

/// Threads that are inside of old code, or will return into it.
fn refuse_inside(
    body: &Body,
    gone: &MappingState,
    face: &Face,
    checkpoint: &Checkpoint,
) -> Result<(), RestoreError> {
    let why = "this kernel has another one, and the thread needs the rest of the old one; take the checkpoint again, \
               or restore it on the kernel version of the checkpoint";
    let inside = |address: u64| {
        let is_gone = (gone.start..gone.end()).contains(&address);
        !face.may_stand(address) || is_gone && !face.range.contains(&address)
    };
    for thread in &body.threads {
        if inside(thread.state.registers.instruction_pointer()) {
            return Err(unsupported(format!("thread {}, stopped inside the vDSO,", thread.tid), why));
        }
        if interrupted(body, thread, checkpoint, inside)? {
            let what = format!("thread {}, in a signal handler that will return into the vDSO,", thread.tid);
            return Err(unsupported(what, why));
        }
    }
    Ok(())
}

/// Whether a signal handler of the thread will return to an address that is `inside`: looked for in the part of the
/// stack that is in use, by the form of the kernel's signal frames. A handler that has switched stacks is not seen.
fn interrupted(
    body: &Body,
    thread: &Thread,
    checkpoint: &Checkpoint,
    inside: impl Fn(u64) -> bool,
) -> Result<bool, RestoreError> {
    let alternate = |thread: &Thread| {
        let (start, _, size) = thread.state.signals.alternate_stack;
        start..start.saturating_add(size)
    };
    let top = thread.state.registers.stack_pointer() & !7;
    let end = if alternate(thread).contains(&top) {
        alternate(thread).end
    } else {
        let mapping = body.mappings.iter().find(|mapping| (mapping.start..mapping.end()).contains(&top));
        mapping.map_or(top, MappingState::end)
    };
    // Frames that remain on alternate stacks that are not in use mean nothing.
    let is_other = |address: u64| {
        body.threads
            .iter()
            .any(|other| alternate(other).contains(&address) && !alternate(other).contains(&top))
    };
    let mut found = false;
    memory::read_stored(
        checkpoint,
        &body.pages,
        (top, end.min(top.saturating_add(STACK_SEARCHED))),
        |at, bytes| {
            let words: Vec<u64> = bytes
                .chunks_exact(8)
                .map(|word| word.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte)))
                .collect();
            found |= redirect::interrupted_at(&words)
                .any(|(index, address)| inside(address) && !is_other(at + 8 * index as u64));
        },
    )?;
    Ok(found)
}
