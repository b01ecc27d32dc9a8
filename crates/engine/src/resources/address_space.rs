//! The layout of an address space that is not mappings: the numbers that `/proc/PID/stat` and brk(2) go by, the
//! auxiliary vector and the executable behind `/proc/PID/exe` (`PR_SET_MM_MAP` in prctl(2)).

use limosa_puppet::{CallId, Data, Outcome, Program};
use serde::{Deserialize, Serialize};

use super::ProcessAttribute;
use super::shared_memory::SharedObjects;
use crate::error::CaptureError;
use crate::view::ProcessView;

/// Sizes that the kernel allows the auxiliary vector (`AT_VECTOR_SIZE`), in words.
const AUXV_WORDS_MAX: usize = 52;

/// Addresses of the parts of a process.
#[derive(Debug, Serialize, Deserialize)]
pub struct AddressSpace {
    /// In the order of `struct prctl_mm_map`: start and end of code, start and end of data, start of the heap and
    /// its break, start of the stack, start and end of arguments, start and end of the environment.
    pub bounds: [u64; 11],
    /// The auxiliary vector: pairs of type and value.
    pub auxv: Vec<(u64, u64)>,
    /// Path of the executable.
    pub executable: serde_bytes::ByteBuf,
    /// Index of the shared object, if the executable has been deleted or replaced.
    pub deleted_executable: Option<usize>,
}

/// Where the break will be.
pub struct Asked {
    brk: CallId,
}

impl ProcessAttribute for AddressSpace {
    type Asked = Asked;

    fn ask(_: &ProcessView, program: &mut Program) -> Result<Asked, CaptureError> {
        Ok(Asked { brk: program.call("ask for the break", libc::SYS_brk, [0.into()]) })
    }

    fn capture(process: &ProcessView, asked: &Asked, outcome: &Outcome) -> Result<Self, CaptureError> {
        let question = |source| CaptureError::Question { pid: process.pid, source };
        let stat = &process.stat;
        let brk = outcome.result(asked.brk).map_err(question)?;
        let executable = process.proc.exe()?;
        Ok(Self {
            bounds: [
                stat.start_code,
                stat.end_code,
                stat.start_data,
                stat.end_data,
                stat.start_brk,
                brk,
                stat.start_stack,
                stat.arg_start,
                stat.arg_end,
                stat.env_start,
                stat.env_end,
            ],
            auxv: process.proc.auxv()?,
            executable: executable.into(),
            deleted_executable: None,
        })
    }

    fn rebuild(&self, program: &mut Program) {
        if self.deleted_executable.is_some() {
            // Set already, when its descriptor was there.
            self.lay_out(Executable::Unchanged, program);
            return;
        }
        let path = program.string(&self.executable);
        let executable = program.call(
            "open the executable",
            libc::SYS_openat,
            [libc::AT_FDCWD.into(), path.into(), (libc::O_RDONLY | libc::O_CLOEXEC).into()],
        );
        self.lay_out(Executable::Opened(executable), program);
        program.call("close the executable", libc::SYS_close, [executable.into()]);
    }
}

/// What is to become of the executable.
#[derive(Clone, Copy)]
enum Executable {
    /// It stays.
    Unchanged,
    /// This descriptor of the puppet is it.
    Descriptor(i32),
    /// What this call opens is it.
    Opened(CallId),
}
const PR_SET_MM_MAP: i32 = 14;
const MAP_SIZE: usize = 104;
const EXECUTABLE_OFFSET: usize = 100;

impl AddressSpace {
    /// The break: the end of the heap, which grows upwards.
    pub(crate) fn heap_end(&self) -> u64 {
        self.bounds[5]
    }

    /// Captures an executable that no path leads to any more.
    pub fn capture_deleted(
        &mut self,
        process: &ProcessView,
        shared: &mut SharedObjects,
    ) -> Result<(), CaptureError> {
        if let Some(path) = self.executable.strip_suffix(b" (deleted)") {
            let file = process.proc.open_file("exe", rustix::fs::OFlags::RDONLY)?;
            self.deleted_executable = Some(shared.of_descriptor(process.pid, file, path)?);
        }
        Ok(())
    }

    /// Adds the call that makes descriptor `number` the executable.
    pub fn set_executable(&self, number: i32, program: &mut Program) {
        self.lay_out(Executable::Descriptor(number), program);
    }

    /// Adds the call that sets the layout and the executable, a descriptor.
    fn lay_out(&self, executable: Executable, program: &mut Program) {
        let mut vector: Vec<u64> =
            self.auxv.iter().take(AUXV_WORDS_MAX / 2 - 1).flat_map(|(kind, value)| [*kind, *value]).collect();
        vector.extend([0, 0]);
        let auxv = program.words(&vector);
        let descriptor = match executable {
            Executable::Descriptor(number) => number as u32,
            Executable::Unchanged | Executable::Opened(_) => u32::MAX,
        };
        let map = self.map(program, auxv, vector.len() * 8, descriptor);
        if let Executable::Opened(call) = executable {
            program.store(call, map, EXECUTABLE_OFFSET);
        }
        program.call(
            "set the layout of the address space",
            libc::SYS_prctl,
            [libc::PR_SET_MM.into(), PR_SET_MM_MAP.into(), map.into(), MAP_SIZE.into(), 0.into()],
        );
    }

    /// `struct prctl_mm_map` (include/uapi/linux/prctl.h): 11 bounds, the vector's address, then its size and the
    /// executable's descriptor as 32-bit numbers; one spare word, because the descriptor is stored as a word.
    fn map(&self, program: &mut Program, auxv: Data, auxv_size: usize, executable: u32) -> Data {
        let mut words = self.bounds.to_vec();
        words.extend([0, auxv_size as u64 | u64::from(executable) << 32, 0]);
        let map = program.words(&words);
        program.point(map, 88, auxv);
        map
    }
}
