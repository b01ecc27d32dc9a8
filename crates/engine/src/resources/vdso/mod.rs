//! The vDSO: code that the kernel maps into every process so that it can ask for the time without a system call
//! (vdso(7)), and right below it the data that this code reads (`[vvar]`, since 6.13 also `[vvar_vclock]`).
//!
//! It is the kernel's, and differs from version to version, with the processor too. A checkpoint holds the code
//! once, and where it was in every process. A restore has this kernel map its own at the same place if both are the
//! same. If not, the C library's pointers into the old one must still lead to the time: see [`adapt`].

mod adapt;
mod place;

use std::sync::OnceLock;

use limosa_kernel::memory;
use limosa_kernel::proc::{Mapping, MappingName, ProcDir};
use limosa_puppet::Program;
use serde::{Deserialize, Serialize};

pub use adapt::{Adaptation, adapt};

use super::mapping::{Backing, MappingState};
use crate::error::{CaptureError, Refusal, RestoreError};
use crate::view::ProcessView;

/// `ARCH_MAP_VDSO_64` of arch_prctl(2).
const ARCH_MAP_VDSO_64: i32 = 0x2003;

/// Type of the entry of the auxiliary vector that says where the vDSO's ELF header is (getauxval(3)).
pub(crate) const AT_SYSINFO_EHDR: u64 = 33;

/// A kernel's vDSO.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VdsoState {
    /// Digest of `image`, by which the processes' mappings name it.
    pub digest: u64,
    /// Bytes of the mapping of its code.
    pub length: u64,
    /// The code as its ELF headers describe it: what lies behind is where visits leave their stub.
    #[serde(with = "serde_bytes")]
    pub image: Vec<u8>,
}

impl VdsoState {
    /// The state of a vDSO whose code consists of `image`, in a mapping of `length` bytes.
    pub fn new(length: u64, image: Vec<u8>) -> Self {
        Self { digest: digest(&image), length, image }
    }
}

/// The vDSO of the kernel that Limosa itself runs on.
pub(crate) struct Own {
    pub(crate) state: VdsoState,
    /// Bytes of its data, right below its code.
    pub(crate) data_length: u64,
}

impl Own {
    /// Bytes of all of it.
    pub(crate) fn length(&self) -> u64 {
        self.data_length + self.state.length
    }
}

/// This kernel's vDSO; none on a kernel that runs without.
pub(crate) fn own() -> limosa_kernel::Result<Option<&'static Own>> {
    static OWN: OnceLock<Option<Own>> = OnceLock::new();
    if let Some(known) = OWN.get() {
        return Ok(known.as_ref());
    }
    let found = find_own()?;
    Ok(OWN.get_or_init(|| found).as_ref())
}

fn find_own() -> limosa_kernel::Result<Option<Own>> {
    let pid = std::process::id() as i32;
    let maps = ProcDir::open(pid)?.maps()?;
    let Some(code) = maps.iter().find(|mapping| mapping.name == MappingName::Vdso) else { return Ok(None) };
    let mut image = vec![0; code.len() as usize];
    memory::read(pid, code.start, &mut image)?;
    let Some(extent) = limosa_puppet::elf_extent(&image) else { return Ok(None) };
    image.truncate(extent);
    let state = VdsoState::new(code.len(), image);
    Ok(Some(Own { state, data_length: code.start - lowest_neighbour(code, &maps) }))
}

/// Where the data below the vDSO's code begins.
fn lowest_neighbour(code: &Mapping, maps: &[Mapping]) -> u64 {
    maps.iter().rev().fold(code.start, |start, mapping| {
        let is_data = matches!(mapping.name, MappingName::Vvar | MappingName::VvarVclock);
        if is_data && mapping.end == start { mapping.start } else { start }
    })
}

/// The vDSO of a process, as one mapping.
pub(crate) fn capture(process: &ProcessView) -> Result<MappingState, CaptureError> {
    let Some(code) = process.mappings.iter().find(|mapping| mapping.name == MappingName::Vdso) else {
        let remedy = "run it on a kernel with vdso enabled (no vdso=0)";
        return Err(Refusal::process(process.pid, "it has no vDSO", remedy).into());
    };
    let refuse = |reason, remedy| -> CaptureError {
        Refusal::mapping(process.pid, code.start, code.name.to_string(), reason, remedy).into()
    };
    let own =
        own()?.ok_or_else(|| refuse("Limosa has none to compare it with", "run Limosa on that kernel"))?;
    let start = lowest_neighbour(code, &process.mappings);
    let parts = process.mappings.iter().filter(|mapping| is_part(mapping));
    if code.end - start != own.length() || parts.map(Mapping::len).sum::<u64>() != own.length() {
        return Err(refuse("the process has taken it apart", "run the program without that"));
    }
    let mut image = vec![0; own.state.image.len().min(code.len() as usize)];
    memory::read(process.pid, code.start, &mut image)?;
    if image != own.state.image {
        return Err(refuse("the process has changed its code", "run the program without that"));
    }
    Ok(mapping_at(start, own))
}

/// Whether this is the vDSO's code or data.
pub(crate) fn is_part(mapping: &Mapping) -> bool {
    matches!(mapping.name, MappingName::Vdso | MappingName::Vvar | MappingName::VvarVclock)
}

/// This kernel's vDSO, with its data at `start`.
fn mapping_at(start: u64, own: &Own) -> MappingState {
    let protection = libc::PROT_READ | libc::PROT_EXEC;
    MappingState::plain(start, own.length(), protection, Backing::Vdso(own.state.digest))
}

/// Adds the call that maps this kernel's vDSO, with its data at `start`.
pub(crate) fn map(start: u64, program: &mut Program) {
    program.call("map the vDSO", libc::SYS_arch_prctl, [ARCH_MAP_VDSO_64.into(), start.into()]);
}

/// The kernel takes the address for a hint; jumps to it that have been computed do not.
pub(crate) fn check_place(pid: i32, mappings: &[MappingState]) -> Result<(), RestoreError> {
    let wanted = mappings.iter().find(|mapping| matches!(mapping.backing, Backing::Vdso(_)));
    let (Some(wanted), Some(own)) = (wanted, own()?) else { return Ok(()) };
    let maps = ProcDir::open(pid)?.maps()?;
    let code = maps.iter().find(|mapping| mapping.name == MappingName::Vdso);
    if code.is_some_and(|code| code.start == wanted.start.saturating_add(own.data_length)) {
        return Ok(());
    }
    Err(RestoreError::Rebuild {
        object: format!("the vDSO of process {pid}"),
        step: "arch_prctl(ARCH_MAP_VDSO_64) mapped it elsewhere",
        source: std::io::ErrorKind::AddrInUse.into(),
    })
}

/// FNV-1a.
fn digest(image: &[u8]) -> u64 {
    image.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
