//! Machine code that leads from a function of an old vDSO to the same function of another, and how to see that a
//! signal interrupted such a function.

/// `e_machine` of vDSOs for this processor (`EM_X86_64`).
pub const ELF_MACHINE: u16 = 62;

/// `mov rax, imm64`; `jmp rax`. On entry to a function of the System V ABI nothing is expected in `rax`.
const LOAD: [u8; 2] = [0x48, 0xb8];
const JUMP: [u8; 2] = [0xff, 0xe0];
const JUMP_LENGTH: usize = 12;

/// Code for the entry of a function, that goes on at `target`.
pub fn jump(target: u64) -> Vec<u8> {
    [LOAD.as_slice(), &target.to_le_bytes(), &JUMP].concat()
}

/// Where `code` goes on, if it begins with what [`jump`] makes.
pub fn jump_target(code: &[u8]) -> Option<u64> {
    let target = code.get(..JUMP_LENGTH)?.strip_prefix(&LOAD)?.strip_suffix(&JUMP)?;
    Some(u64::from_le_bytes(target.try_into().ok()?))
}

/// Code for the entry of a function that the kernel's vDSO does not have: the plain system call, which is what a
/// vDSO's function itself does when it does not know better. `None` for a function that is not known.
///
/// Results are those of the kernel, errors as negative numbers, as in a vDSO. The three arguments that any of the
/// calls has are where the system call wants them.
pub fn stand_in(function: &str) -> Option<Vec<u8>> {
    /// `mov rax, -ENOSYS`; `ret`
    const UNKNOWN: [u8; 8] = [0x48, 0xc7, 0xc0, 0xda, 0xff, 0xff, 0xff, 0xc3];
    /// `cmp r8, -1`; `jne` over [`UNKNOWN`]
    const IF_A_QUESTION: [u8; 6] = [0x49, 0x83, 0xf8, 0xff, 0x75, 0x08];
    let number = match function {
        "clock_gettime" => libc::SYS_clock_gettime,
        "clock_getres" => libc::SYS_clock_getres,
        "gettimeofday" => libc::SYS_gettimeofday,
        "time" => libc::SYS_time,
        "getcpu" => libc::SYS_getcpu,
        "getrandom" => libc::SYS_getrandom,
        // No system call enters an SGX enclave, and a process that has one is not carried.
        "sgx_enter_enclave" => return Some(UNKNOWN.to_vec()),
        _ => return None,
    };
    // mov eax, imm32; syscall; ret
    let call = [&[0xb8], &(number as u32).to_le_bytes()[..], &[0x0f, 0x05, 0xc3]].concat();
    if function == "getrandom" {
        // With an opaque length of ~0 it is asked for the layout of its state (`vgetrandom_opaque_params`), for
        // which there is no system call: none then, as on a kernel without it. State that a caller has already is
        // not looked at.
        return Some([&IF_A_QUESTION[..], &UNKNOWN, &call].concat());
    }
    Some(call)
}

/// The instruction pointers that signal frames (`struct rt_sigframe`, asm/sigframe.h) among the words of a stack will
/// be set back to, each with the index of its word.
///
/// A frame is known by what follows `rip` in its `struct sigcontext`: flags, and the segments of 64-bit user mode.
pub fn interrupted_at(stack: &[u64]) -> impl Iterator<Item = (usize, u64)> + '_ {
    /// `cs` 0x33, `gs` and `fs` 0, `ss` 0x2b, 16 bits each.
    const SEGMENTS: u64 = 0x002b_0000_0000_0033;
    /// The bit that is always set, and those that have a meaning.
    const FLAG_ONE: u64 = 2;
    const FLAGS: u64 = (1 << 22) - 1;
    stack.windows(3).enumerate().filter_map(|(index, words)| {
        let [rip, flags, segments] = *words else { return None };
        (segments == SEGMENTS && flags & FLAG_ONE != 0 && flags & !FLAGS == 0).then_some((index, rip))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_is_known_by_its_code() {
        let code = jump(0x7fff_1234_5678);
        assert_eq!(jump_target(&code), Some(0x7fff_1234_5678));
        assert_eq!(jump_target(&code[..11]), None);
        assert_eq!(jump_target(&stand_in("time").unwrap()), None);
    }

    /// Calls `code` as a function would be called, in memory of its own.
    fn call(code: &[u8], arguments: [u64; 5]) -> i64 {
        use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
        // SAFETY: fresh memory, that nothing else knows; the code is a function of the C ABI with five arguments.
        unsafe {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            let at = mmap_anonymous(std::ptr::null_mut(), 4096, protection, MapFlags::PRIVATE).unwrap();
            at.cast::<u8>().copy_from_nonoverlapping(code.as_ptr(), code.len());
            mprotect(at, 4096, MprotectFlags::READ | MprotectFlags::EXEC).unwrap();
            let function: extern "C" fn(u64, u64, u64, u64, u64) -> i64 = std::mem::transmute(at);
            let [a, b, c, d, e] = arguments;
            let result = function(a, b, c, d, e);
            munmap(at, 4096).unwrap();
            result
        }
    }

    #[test]
    fn stand_ins_do_what_the_functions_do() {
        let address = |words: &mut [u64; 4]| words.as_mut_ptr() as u64;
        let code = |name| stand_in(name).unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let is_now = |seconds: u64| seconds.abs_diff(now) <= 2;

        let mut words = [0; 4];
        assert_eq!(call(&code("clock_gettime"), [0, address(&mut words), 0, 0, 0]), 0);
        assert!(is_now(words[0]));
        words = [0; 4];
        assert_eq!(call(&code("gettimeofday"), [address(&mut words), 0, 0, 0, 0]), 0);
        assert!(is_now(words[0]));
        assert!(is_now(call(&code("time"), [0; 5]) as u64));
        assert_eq!(call(&code("clock_getres"), [0, address(&mut words), 0, 0, 0]), 0);
        assert_eq!(words[0], 0, "a resolution below a second");
        assert_eq!(call(&code("getcpu"), [address(&mut words), 0, 0, 0, 0]), 0);
        words = [0; 4];
        assert_eq!(call(&code("getrandom"), [address(&mut words), 24, 0, 0, 144]), 24);
        assert!(words[..3].iter().all(|word| *word != 0) && words[3] == 0, "{words:x?}");
        let unknown = i64::from(-libc::ENOSYS);
        assert_eq!(call(&code("getrandom"), [0, 0, 0, address(&mut words), u64::MAX]), unknown);
        assert_eq!(call(&code("sgx_enter_enclave"), [0; 5]), unknown);
        assert_eq!(
            call(&code("clock_gettime"), [99, address(&mut words), 0, 0, 0]),
            i64::from(-libc::EINVAL)
        );
        assert_eq!(stand_in("brew_tea"), None);
    }

    #[test]
    fn a_jump_keeps_all_arguments() {
        extern "C" fn weigh(a: u64, b: u64, c: u64, d: u64, e: u64) -> i64 {
            (a + 10 * b + 100 * c + 1000 * d + 10_000 * e) as i64
        }
        let weigh: extern "C" fn(u64, u64, u64, u64, u64) -> i64 = weigh;
        assert_eq!(call(&jump(weigh as usize as u64), [1, 2, 3, 4, 5]), 54_321);
    }

    /// The frame is the kernel's own: a handler looks at the stack below which it runs.
    #[test]
    fn the_kernels_signal_frames_are_found() {
        use std::sync::atomic::{AtomicU64, Ordering};
        static EXPECTED: AtomicU64 = AtomicU64::new(0);
        static FOUND: AtomicU64 = AtomicU64::new(0);
        extern "C" fn handler(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
            // SAFETY: the kernel's frame, of which the context is a part; 2 KiB from the context on are stack.
            let (rip, words) = unsafe {
                let context: *const libc::ucontext_t = context.cast();
                let rip = (*context).uc_mcontext.gregs[libc::REG_RIP as usize] as u64;
                (rip, std::slice::from_raw_parts(context.cast::<u64>(), 64))
            };
            EXPECTED.store(rip, Ordering::Relaxed);
            FOUND.store(interrupted_at(words).next().map_or(0, |(_, rip)| rip), Ordering::Relaxed);
        }
        // SAFETY: the handler does nothing but atomic stores; SIGUSR2 has no other use here.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(libc::SIGUSR2, &raw const action, std::ptr::null_mut()), 0);
            assert_eq!(libc::raise(libc::SIGUSR2), 0);
        }
        assert_ne!(EXPECTED.load(Ordering::Relaxed), 0);
        assert_eq!(FOUND.load(Ordering::Relaxed), EXPECTED.load(Ordering::Relaxed));
    }
}
