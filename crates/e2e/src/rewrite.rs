//! A checkpoint as it would be if the same processes had run on another kernel: read, changed, and written as a new one.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use limosa_engine::resources::mapping::{Backing, MappingState};
use limosa_engine::resources::vdso::VdsoState;
use limosa_engine::state::{Body, Life, TREE, Tree};
use limosa_image::{Checkpoint, CheckpointWriter, Meta, Sink, SpaceId, WriteError};
use limosa_puppet::VdsoImage;
use limosa_puppet::arch::redirect;

const PAGE: usize = 4096;
const READ_EXECUTE: i32 = 1 | 4;
/// `AT_SYSINFO_EHDR`: where a process is told its vDSO is.
const AT_SYSINFO_EHDR: u64 = 33;

/// A checkpoint, taken apart.
pub struct Parts {
    /// The tree.
    pub tree: Tree,
    /// What the manifest says of it.
    pub meta: Meta,
    /// Its memory, page by page.
    pages: BTreeMap<(SpaceId, u64), Vec<u8>>,
}

impl Sink for Parts {
    fn state(&mut self, _: &str, _: &[u8]) -> Result<(), WriteError> {
        Ok(())
    }

    fn pages(&mut self, space: SpaceId, start: u64, data: &[u8]) -> Result<(), WriteError> {
        for (page, bytes) in (start..).step_by(PAGE).zip(data.chunks(PAGE)) {
            self.pages.insert((space, page), bytes.to_vec());
        }
        Ok(())
    }

    fn forget(&mut self, space: SpaceId, start: u64, length: u64) -> Result<(), WriteError> {
        self.pages.retain(|(owner, at), _| *owner != space || *at < start || *at - start >= length);
        Ok(())
    }

    fn blob(&mut self, _: &str, content: &mut dyn Read) -> Result<u64, WriteError> {
        Ok(std::io::copy(content, &mut std::io::sink()).unwrap_or(0))
    }
}

/// Writes what `change` makes of the checkpoint `from` to `to`. Only for trees without blobs.
pub fn rewrite(from: &Path, to: &Path, change: impl FnOnce(&mut Parts) -> Result<()>) -> Result<()> {
    let checkpoint = Checkpoint::open(from)?;
    ensure!(checkpoint.blob_names().next().is_none(), "{} has blobs", from.display());
    let meta = checkpoint.manifest().meta.clone();
    let mut parts = Parts { tree: checkpoint.state(TREE)?, meta, pages: BTreeMap::new() };
    checkpoint.copy_into(&mut parts)?;
    change(&mut parts)?;
    let mut writer = CheckpointWriter::create(to)?;
    limosa_image::put(&mut writer, TREE, &parts.tree)?;
    for ((space, start), bytes) in &parts.pages {
        writer.pages(*space, *start, bytes)?;
    }
    writer.commit(parts.meta)?;
    Ok(())
}

impl Parts {
    /// The root.
    pub fn body(&mut self) -> Result<&mut Body> {
        self.bodies().next().context("the root is a zombie")
    }

    /// All living processes, the root first.
    fn bodies(&mut self) -> impl Iterator<Item = &mut Body> {
        self.tree.processes.iter_mut().filter_map(|process| match &mut process.life {
            Life::Alive(body) => Some(body.as_mut()),
            Life::Zombie { .. } => None,
        })
    }

    /// Overwrites memory of all processes that have stored pages there, at least of the root.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<()> {
        let root = self.body()?.pages.own();
        let spaces: Vec<SpaceId> = self.bodies().map(|body| body.pages.own()).collect();
        for (at, byte) in (address..).zip(bytes) {
            let within = at % PAGE as u64;
            self.pages.entry((root, at - within)).or_insert_with(|| vec![0; PAGE]);
            for space in &spaces {
                if let Some(page) = self.pages.get_mut(&(*space, at - within)) {
                    page[within as usize] = *byte;
                }
            }
        }
        Ok(())
    }

    /// The vDSO that the checkpoint holds, and where its code is.
    pub fn vdso(&mut self) -> Result<(VdsoState, u64)> {
        let vdso = self.tree.vdso.clone().context("the checkpoint holds no vDSO")?;
        let mapping =
            self.body()?.mappings.iter().find(|mapping| matches!(mapping.backing, Backing::Vdso(_)));
        let start = mapping.context("no vDSO")?.end() - vdso.length;
        Ok((vdso, start))
    }

    /// Says that the vDSO of the kernel of the checkpoint is what `change` makes of it.
    pub fn change_vdso(&mut self, change: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let (mut vdso, _) = self.vdso()?;
        change(&mut vdso.image);
        let vdso = VdsoState::new(vdso.length, vdso.image);
        for mapping in self.bodies().flat_map(|body| &mut body.mappings) {
            if let Backing::Vdso(digest) = &mut mapping.backing {
                *digest = vdso.digest;
            }
        }
        self.tree.vdso = Some(vdso);
        Ok(())
    }

    /// Says that what the process has mapped as `image`, with four pages of data before it, is the vDSO of the kernel
    /// of the checkpoint. The real one becomes memory with jumps there, so that the C library's pointers are good.
    /// Gives the address of `image`.
    pub fn move_to_vdso(&mut self, image: &[u8]) -> Result<u64> {
        let (own, own_start) = self.vdso()?;
        let space = self.body()?.pages.own();
        let first = &image[..PAGE.min(image.len())];
        let is_image = |((in_space, _), page): &(&(SpaceId, u64), &Vec<u8>)| {
            *in_space == space && page.starts_with(first)
        };
        let ((_, start), _) =
            self.pages.iter().find(is_image).context("the process has not mapped the image")?;
        let (start, length) = (*start, image.len().next_multiple_of(PAGE) as u64);
        let data = start - 4 * PAGE as u64;

        let foreign = VdsoImage::parse(image).context("no vDSO")?;
        let mut real = own.image.clone();
        for function in VdsoImage::parse(&own.image).context("no vDSO")?.functions {
            let lead = match foreign.offset_of(&function.name) {
                Some(offset) => redirect::jump(start + offset as u64),
                None => redirect::stand_in(&function.name).context("an unknown function")?,
            };
            real[function.offset..][..lead.len()].copy_from_slice(&lead);
        }
        let vdso = VdsoState::new(length, image.to_vec());
        let body = self.body()?;
        body.mappings.retain(|mapping| mapping.start != start && mapping.start != data);
        for mapping in &mut body.mappings {
            if let Backing::Vdso(_) = mapping.backing {
                *mapping = MappingState::plain(own_start, own.length, READ_EXECUTE, Backing::Anonymous);
            }
        }
        body.mappings.push(MappingState::plain(
            data,
            start + length - data,
            READ_EXECUTE,
            Backing::Vdso(vdso.digest),
        ));
        body.mappings.sort_by_key(|mapping| mapping.start);
        for (kind, value) in &mut body.state.address_space.auxv {
            if *kind == AT_SYSINFO_EHDR {
                *value = start;
            }
        }
        self.pages.retain(|(in_space, page), _| *in_space != space || !(data..start + length).contains(page));
        self.write(own_start, &real)?;
        self.tree.vdso = Some(vdso);
        Ok(start)
    }
}

/// A vDSO that no kernel ever had: functions that are plain system calls, in another order and at other offsets than
/// in any kernel's, without some that there are and with one that is not everywhere.
pub fn invented_vdso() -> Vec<u8> {
    const TEXT: usize = 0x1340;
    const SPACING: usize = 0x50;
    const NAMES: [&str; 6] =
        ["sgx_enter_enclave", "getcpu", "clock_gettime", "time", "clock_getres", "gettimeofday"];
    let mut image = vec![0; TEXT];
    let mut names = vec![0];
    let mut symbols = vec![0; 24];
    for (index, name) in NAMES.iter().enumerate() {
        let offset = TEXT + index * SPACING;
        image.resize(offset, 0xcc);
        image.extend(redirect::stand_in(name).unwrap_or_default());
        // st_name, st_info (global function), st_other, st_shndx, st_value, st_size
        symbols.extend((names.len() as u32).to_le_bytes());
        symbols.extend([0x12, 0, 1, 0]);
        symbols.extend((offset as u64).to_le_bytes());
        symbols.extend((SPACING as u64 - 0x10).to_le_bytes());
        names.extend(format!("__vdso_{name}\0").bytes());
    }
    image.resize(TEXT + NAMES.len() * SPACING, 0xcc);
    let text = image.len() - TEXT;
    let (at_names, at_symbols) = (image.len(), image.len() + names.len());
    image.extend(&names);
    image.extend(&symbols);
    let at_sections = image.len();
    // sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, sh_link, sh_info, sh_addralign, sh_entsize
    let mut section = |kind: u32, flags: u64, offset: usize, size: usize, link: u32| {
        image.extend([0; 4]);
        image.extend(kind.to_le_bytes());
        for word in [flags, offset as u64, offset as u64, size as u64] {
            image.extend(word.to_le_bytes());
        }
        image.extend(link.to_le_bytes());
        image.extend([0; 20]);
    };
    section(0, 0, 0, 0, 0);
    section(1, 2 | 4, TEXT, text, 0);
    section(3, 2, at_names, names.len(), 0);
    section(11, 2, at_symbols, symbols.len(), 2);
    // ELF, 64-bit, little-endian, version 1; ET_DYN, x86-64
    image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    image[16..24].copy_from_slice(&[3, 0, redirect::ELF_MACHINE as u8, 0, 1, 0, 0, 0]);
    image[40..48].copy_from_slice(&(at_sections as u64).to_le_bytes());
    image[52..64].copy_from_slice(&[64, 0, 56, 0, 0, 0, 64, 0, 4, 0, 0, 0]);
    image
}
