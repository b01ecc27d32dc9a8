//! Programs: arrays of system calls, built by pure functions, executed by a puppet.
//!
//! ```text
//! memory image of a program, 8-byte aligned:
//!
//!   op 0   | op 1 | … | op n-1 | END | data …
//!
//! an op is 64 bytes:
//!   0  number of the system call   u32
//!   4  kind (u8) and flags (u8)    u32   kinds: 0 END, 1 CALL, 2 MOVE, 3 ENTER (see arch)
//!   8  six arguments               6 × u64
//!   56 result                      u64   UNRUN before it ran
//! ```
//!
//! A CALL that fails ends the program unless it may fail. A MOVE copies one word from an earlier op's
//! result (or from the data) into a later op's argument just before that op runs.

use std::borrow::Cow;
use std::fmt;

use serde::Serialize;

/// Bytes of one op.
pub const OP_SIZE: usize = 64;
const RESULT_OFFSET: usize = 56;
/// The result of a call that has not run.
const UNRUN: u64 = 0x8000_0000_0000_4c4d;

const KIND_CALL: u32 = 1;
const KIND_MOVE: u32 = 2;
const FLAG_MAY_FAIL: u32 = 1 << 8;
const FLAG_CLONE: u32 = 1 << 9;

/// One call of a [`Program`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallId(usize);

/// A buffer that travels with a [`Program`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    offset: usize,
    length: usize,
}

/// An argument of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// A number or an address in the puppet.
    Value(u64),
    /// The result of an earlier call.
    ResultOf(CallId),
    /// The address, in the puppet, of a buffer of the program.
    Address(Data),
    /// The address `.1` bytes into a buffer of the program.
    Within(Data, usize),
    /// The 32-bit number that stands in the buffer when the call is made (zero-extended): for what an
    /// earlier call has written there. The buffer must be 8 bytes long.
    Word(Data),
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::Value(value)
    }
}
impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        Self::Value(i64::from(value) as u64)
    }
}
impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Self::Value(value.into())
    }
}
impl From<usize> for Arg {
    fn from(value: usize) -> Self {
        Self::Value(value as u64)
    }
}
impl From<Data> for Arg {
    fn from(data: Data) -> Self {
        Self::Address(data)
    }
}
impl From<CallId> for Arg {
    fn from(call: CallId) -> Self {
        Self::ResultOf(call)
    }
}

#[derive(Clone, Debug)]
struct Op {
    number: u32,
    flags: u32,
    arguments: [Arg; 6],
    /// Results of earlier calls, copied as words into buffers right before this call.
    stores: Vec<(CallId, Data, usize)>,
    /// What the call is for, shown in errors and by `--explain`.
    purpose: &'static str,
}

/// A program under construction.
#[derive(Clone, Debug, Default)]
pub struct Program {
    ops: Vec<Op>,
    data: Vec<u8>,
    /// Words in the data that hold the address of another buffer (pointers inside structs).
    pointers: Vec<(usize, Data, usize)>,
    /// Stores asked for since the last call was added.
    stores: Vec<(CallId, Data, usize)>,
    /// Programs of children, and the room for each in the data.
    children: Vec<(Data, Program)>,
}

impl Program {
    /// An empty program.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds system call `number`; `purpose` is what a person reads when it fails.
    pub fn call<const N: usize>(
        &mut self,
        purpose: &'static str,
        number: i64,
        arguments: [Arg; N],
    ) -> CallId {
        self.add(purpose, number, &arguments, 0)
    }

    /// Adds a call whose failure does not end the program.
    pub fn try_call<const N: usize>(
        &mut self,
        purpose: &'static str,
        number: i64,
        arguments: [Arg; N],
    ) -> CallId {
        self.add(purpose, number, &arguments, FLAG_MAY_FAIL)
    }

    /// Adds clone3(2) with `arguments` as `struct clone_args` of `size` bytes: the child goes on with the
    /// program at `child_program` as the puppet of `child_mailbox` (addresses in the puppet).
    pub fn clone3(
        &mut self,
        purpose: &'static str,
        arguments: Data,
        size: usize,
        child_mailbox: u64,
        child_program: u64,
    ) -> CallId {
        let list =
            [arguments.into(), size.into(), 0.into(), 0.into(), child_mailbox.into(), child_program.into()];
        self.add(purpose, libc::SYS_clone3, &list, FLAG_CLONE)
    }

    /// Adds clone3(2) with `arguments` as `struct clone_args` of `size` bytes, without shared memory: the child has its own
    /// copy of this program's memory, and goes on with `child`, which must not come to its end.
    pub fn fork(&mut self, purpose: &'static str, arguments: Data, size: usize, child: Self) -> CallId {
        let room = self.space(child.size());
        self.children.push((room, child));
        let list = [arguments.into(), size.into(), 0.into(), 0.into(), 0.into(), room.into()];
        self.add(purpose, libc::SYS_clone3, &list, FLAG_CLONE | FLAG_MAY_FAIL)
    }

    fn add(&mut self, purpose: &'static str, number: i64, arguments: &[Arg], flags: u32) -> CallId {
        let mut six = [Arg::Value(0); 6];
        six[..arguments.len()].copy_from_slice(arguments);
        let stores = std::mem::take(&mut self.stores);
        self.ops.push(Op { number: number as u32, flags, arguments: six, stores, purpose });
        CallId(self.ops.len() - 1)
    }

    /// Adds a buffer with these bytes, aligned to 16.
    pub fn bytes(&mut self, bytes: &[u8]) -> Data {
        self.data.resize(self.data.len().next_multiple_of(16), 0);
        let offset = self.data.len();
        self.data.extend_from_slice(bytes);
        Data { offset, length: bytes.len() }
    }

    /// Adds a buffer of these words.
    pub fn words(&mut self, words: &[u64]) -> Data {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.bytes(&bytes)
    }

    /// Adds a zeroed buffer, for a call to write to.
    pub fn space(&mut self, length: usize) -> Data {
        self.data.resize(self.data.len().next_multiple_of(16), 0);
        let offset = self.data.len();
        self.data.resize(offset + length, 0);
        Data { offset, length }
    }

    /// Adds a NUL-terminated string.
    pub fn string(&mut self, text: &[u8]) -> Data {
        let mut bytes = text.to_vec();
        bytes.push(0);
        self.bytes(&bytes)
    }

    /// Makes the word at byte `at` of `buffer` the address of `target` in the puppet.
    pub fn point(&mut self, buffer: Data, at: usize, target: Data) {
        self.pointers.push((buffer.offset + at, target, 0));
    }

    /// Has the result of `call` copied, as a word, to byte `at` of `buffer` before the next call that is added.
    pub fn store(&mut self, call: CallId, buffer: Data, at: usize) {
        self.stores.push((call, buffer, at));
    }

    /// How many calls there are.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Bytes of the memory image, at most (before the MOVEs are known exactly, each argument may need one).
    pub fn size(&self) -> usize {
        let moves: usize = self.ops.iter().map(Op::moves).sum();
        (self.ops.len() + moves + 1) * OP_SIZE + self.data.len() + 16
    }

    /// The memory image for address `base` in the puppet.
    pub fn render(self, base: u64) -> RenderedProgram {
        let mut places = Vec::with_capacity(self.ops.len());
        let mut position = 0;
        for op in &self.ops {
            position += op.moves() * OP_SIZE;
            places.push(position);
            position += OP_SIZE;
        }
        let data_offset = (position + OP_SIZE).next_multiple_of(16);
        let mut image = vec![0_u8; data_offset + self.data.len()];
        let address = |data: &Data, within: usize| base + (data_offset + data.offset + within) as u64;
        for (index, op) in self.ops.iter().enumerate() {
            let place = places[index];
            let mut before = place - op.moves() * OP_SIZE;
            for (call, buffer, at) in &op.stores {
                let source = base + (places[call.0] + RESULT_OFFSET) as u64;
                put(
                    &mut image,
                    before,
                    &[u64::from(KIND_MOVE) << 32, source, address(buffer, *at), 0, 0, 0, 0, 0],
                );
                before += OP_SIZE;
            }
            let mut words = [0_u64; 8];
            words[0] = u64::from(op.number) | u64::from(KIND_CALL | op.flags) << 32;
            for (slot, argument) in op.arguments.iter().enumerate() {
                let source = match argument {
                    Arg::Value(value) => {
                        words[1 + slot] = *value;
                        continue;
                    }
                    Arg::Address(data) => {
                        words[1 + slot] = address(data, 0);
                        continue;
                    }
                    Arg::Within(data, offset) => {
                        words[1 + slot] = address(data, *offset);
                        continue;
                    }
                    Arg::ResultOf(call) => base + (places[call.0] + RESULT_OFFSET) as u64,
                    Arg::Word(data) => address(data, 0),
                };
                let target = base + (place + 8 + slot * 8) as u64;
                put(&mut image, before, &[u64::from(KIND_MOVE) << 32, source, target, 0, 0, 0, 0, 0]);
                before += OP_SIZE;
            }
            words[7] = UNRUN;
            put(&mut image, place, &words);
        }
        image[data_offset..].copy_from_slice(&self.data);
        for (at, target, within) in &self.pointers {
            let word = address(target, *within);
            image[data_offset + at..data_offset + at + 8].copy_from_slice(&word.to_le_bytes());
        }
        for (room, child) in self.children {
            let child = child.render(base + (data_offset + room.offset) as u64);
            let at = data_offset + room.offset;
            image[at..at + child.image.len()].copy_from_slice(&child.image);
        }
        RenderedProgram { image, places, data_offset, ops: self.ops }
    }
}

impl Op {
    /// How many MOVEs stand before it.
    fn moves(&self) -> usize {
        self.stores.len() + self.arguments.iter().filter(|argument| argument.is_late()).count()
    }
}

impl Arg {
    fn is_late(&self) -> bool {
        matches!(self, Self::ResultOf(_) | Self::Word(_))
    }
}

fn put(image: &mut [u8], at: usize, words: &[u64; 8]) {
    for (index, word) in words.iter().enumerate() {
        image[at + index * 8..at + index * 8 + 8].copy_from_slice(&word.to_le_bytes());
    }
}

/// A call of a program as it is shown.
#[derive(Clone, Debug, Serialize)]
pub struct ShownCall {
    /// The system call's name.
    pub call: Cow<'static, str>,
    /// Its arguments; zeros at the end are left out.
    pub arguments: Vec<ShownArgument>,
    /// Whether the program goes on if it fails.
    pub may_fail: bool,
    /// What it is for.
    pub purpose: &'static str,
}

/// An argument as it is shown: the addresses of buffers are not known before the program has its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum ShownArgument {
    /// A number or an address in the puppet.
    Value(u64),
    /// The result of an earlier call.
    Result {
        /// Its index.
        result_of: usize,
    },
    /// The address of a buffer, or of something in it.
    Buffer {
        /// Bytes in it.
        buffer_bytes: usize,
    },
    /// The 32-bit number that an earlier call has put into a buffer.
    Word {
        /// Bytes of that buffer.
        word_in_bytes: usize,
    },
}

impl From<Arg> for ShownArgument {
    fn from(argument: Arg) -> Self {
        match argument {
            Arg::Value(value) => Self::Value(value),
            Arg::ResultOf(call) => Self::Result { result_of: call.0 },
            Arg::Address(data) | Arg::Within(data, _) => Self::Buffer { buffer_bytes: data.length },
            Arg::Word(data) => Self::Word { word_in_bytes: data.length },
        }
    }
}

impl fmt::Display for ShownArgument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value(value) if *value < 4096 => write!(f, "{value}"),
            Self::Value(value) => write!(f, "{value:#x}"),
            Self::Result { result_of } => write!(f, "result[{result_of}]"),
            Self::Buffer { buffer_bytes } => write!(f, "<{buffer_bytes} bytes>"),
            Self::Word { .. } => write!(f, "<word>"),
        }
    }
}

impl fmt::Display for ShownCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}(", self.call)?;
        for (slot, argument) in self.arguments.iter().enumerate() {
            write!(f, "{}{argument}", if slot == 0 { "" } else { ", " })?;
        }
        write!(f, ")    {}", self.purpose)
    }
}

impl Program {
    /// Its calls as they are shown to people and programs.
    pub fn shown(&self) -> impl Iterator<Item = ShownCall> {
        self.ops.iter().map(|op| {
            let last = op.arguments.iter().rposition(|argument| *argument != Arg::Value(0));
            let arguments = &op.arguments[..last.map_or(0, |at| at + 1)];
            ShownCall {
                call: syscall_name(op.number),
                arguments: arguments.iter().map(|argument| (*argument).into()).collect(),
                may_fail: op.flags & FLAG_MAY_FAIL != 0,
                purpose: op.purpose,
            }
        })
    }
}

impl fmt::Display for Program {
    /// One line a call.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shown().enumerate().try_for_each(|(index, call)| writeln!(f, "{index:5}  {call}"))
    }
}

/// The name of a system call that programs use, or its number.
fn syscall_name(number: u32) -> Cow<'static, str> {
    crate::arch::syscall_name(i64::from(number))
        .map_or_else(|| format!("syscall_{number}").into(), Cow::Borrowed)
}

/// A call of a program that failed.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The kernel refused a call.
    #[error("{purpose}: {call} in the puppet failed: {source}")]
    Call {
        /// What the call was for.
        purpose: &'static str,
        /// The system call.
        call: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The program ended before this call, because an earlier one failed.
    #[error("{purpose}: {call} was not reached")]
    NotReached {
        /// What the call was for.
        purpose: &'static str,
        /// The system call.
        call: String,
    },
}

/// A program laid out for one address.
#[derive(Clone, Debug)]
pub struct RenderedProgram {
    image: Vec<u8>,
    places: Vec<usize>,
    data_offset: usize,
    ops: Vec<Op>,
}

impl RenderedProgram {
    /// The bytes to put at the address it was rendered for.
    pub fn image(&self) -> &[u8] {
        &self.image
    }

    /// Reads the results from the image as the puppet left it, which must be as long as [`Self::image`].
    pub fn outcome(self, image: Vec<u8>) -> Outcome {
        debug_assert_eq!(image.len(), self.image.len());
        Outcome { image, places: self.places, data_offset: self.data_offset, ops: self.ops }
    }
}

/// What a program did.
#[derive(Clone, Debug)]
pub struct Outcome {
    image: Vec<u8>,
    places: Vec<usize>,
    data_offset: usize,
    ops: Vec<Op>,
}

impl Outcome {
    fn raw(&self, call: CallId) -> u64 {
        let at = self.places[call.0] + RESULT_OFFSET;
        u64::from_le_bytes(self.image[at..at + 8].try_into().unwrap_or_default())
    }

    /// The value that a call returned, or why it has none.
    pub fn result(&self, call: CallId) -> Result<u64, ProgramError> {
        let op = &self.ops[call.0];
        let name = || syscall_name(op.number).into_owned();
        match self.raw(call) {
            UNRUN => Err(ProgramError::NotReached { purpose: op.purpose, call: name() }),
            value if value > u64::MAX - 4096 => Err(ProgramError::Call {
                purpose: op.purpose,
                call: name(),
                source: std::io::Error::from_raw_os_error(-(value as i64) as i32),
            }),
            value => Ok(value),
        }
    }

    /// The first failure that ended the program, if any.
    pub fn check(&self) -> Result<(), ProgramError> {
        for (index, op) in self.ops.iter().enumerate() {
            match self.result(CallId(index)) {
                Err(error @ ProgramError::Call { .. }) if op.flags & FLAG_MAY_FAIL == 0 => return Err(error),
                Err(error @ ProgramError::NotReached { .. }) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// The bytes of a buffer as the program left them.
    pub fn bytes(&self, data: Data) -> &[u8] {
        &self.image[self.data_offset + data.offset..self.data_offset + data.offset + data.length]
    }

    /// The `index`-th word of a buffer.
    pub fn word(&self, data: Data, index: usize) -> u64 {
        let bytes = self.bytes(data);
        bytes
            .get(index * 8..index * 8 + 8)
            .map_or(0, |word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_flow_into_later_calls() {
        let mut program = Program::new();
        let first = program.call("first", libc::SYS_getpid, []);
        let buffer = program.words(&[7, 8]);
        program.call("second", libc::SYS_tgkill, [first.into(), Arg::Within(buffer, 8), 0.into()]);
        let rendered = program.render(0x1000);
        assert_eq!(rendered.places, [0, 128], "one MOVE stands between the two calls");
        let word = |at: usize| u64::from_le_bytes(rendered.image()[at..at + 8].try_into().unwrap());
        assert_eq!(word(64), 2 << 32);
        assert_eq!(word(72), 0x1000 + 56);
        assert_eq!(word(80), 0x1000 + 128 + 8);
        assert_eq!(word(128 + 16), 0x1000 + rendered.data_offset as u64 + 8);
    }

    #[test]
    fn what_did_not_run_is_said() {
        let mut program = Program::new();
        let only = program.call("ask for the process id", libc::SYS_getpid, []);
        let rendered = program.render(0);
        let image = rendered.image().to_vec();
        let outcome = rendered.outcome(image);
        assert!(matches!(outcome.result(only), Err(ProgramError::NotReached { .. })));
        assert!(outcome.check().is_err());
    }
}
