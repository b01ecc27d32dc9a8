//! The two stubs for x86-64.
//!
//! Both contain the same walker. Registers while it runs: `rbx` the current op, `r14` where to go on after
//! an ENTERed list (0: none), `r12` the mailbox (resident) or scratch address (visitor), `r13` scratch
//! length (visitor), `r15` flags of the current op. System calls clobber only `rax`, `rcx` and `r11`. No stub
//! uses the stack.

use std::arch::global_asm;
use std::sync::LazyLock;

pub mod redirect;

/// Stops right before the walker's labels are repeated: the walker needs `finish` and `child` after it.
macro_rules! walker {
    ($prefix:literal) => {
        concat!(
            $prefix, "_next:\n",
            "mov rcx, [rbx]\n",
            "mov eax, ecx\n",
            "shr rcx, 32\n",
            "cmp cl, 1\n",
            "je ", $prefix, "_call\n",
            "jb ", $prefix, "_end\n",
            "cmp cl, 2\n",
            "je ", $prefix, "_move\n",
            // ENTER: go on at the address in argument 0 and come back at its END; skip it if the address is an error.
            "mov rax, [rbx + 8]\n",
            "add rbx, 64\n",
            "cmp rax, -4096\n",
            "ja ", $prefix, "_next\n",
            "mov r14, rbx\n",
            "mov rbx, rax\n",
            "jmp ", $prefix, "_next\n",
            $prefix, "_move:\n",
            "mov rax, [rbx + 8]\n",
            "mov rax, [rax]\n",
            "mov rcx, [rbx + 16]\n",
            "mov [rcx], rax\n",
            "add rbx, 64\n",
            "jmp ", $prefix, "_next\n",
            $prefix, "_call:\n",
            "mov r15d, ecx\n",
            "mov rdi, [rbx + 8]\n",
            "mov rsi, [rbx + 16]\n",
            "mov rdx, [rbx + 24]\n",
            "mov r10, [rbx + 32]\n",
            "mov r8, [rbx + 40]\n",
            "mov r9, [rbx + 48]\n",
            "syscall\n",
            "test r15d, 0x200\n", // CLONE: the child must not write the parent's result
            "jz ", $prefix, "_store\n",
            "test rax, rax\n",
            "jz ", $prefix, "_child\n",
            $prefix, "_store:\n",
            "mov [rbx + 56], rax\n",
            "add rbx, 64\n",
            "cmp rax, -4096\n",
            "jbe ", $prefix, "_next\n",
            "test r15d, 0x100\n", // MAY_FAIL
            "jnz ", $prefix, "_next\n",
            $prefix, "_end:\n",
            "test r14, r14\n",
            "jz ", $prefix, "_finish\n",
            "mov rbx, r14\n",
            "xor r14d, r14d\n",
            "jmp ", $prefix, "_next\n",
            $prefix, "_child:\n",
            "mov r12, r8\n",
            "mov rbx, r9\n",
            "xor r14d, r14d\n",
            "jmp ", $prefix, "_next\n",
        )
    };
}

// The resident. Mailbox at r12: u32 command, u32 done, u64 address of the program. The controller writes
// the program's address, then increments `command`; the resident runs it and makes `done` equal to
// `command`. Both are futexes.
global_asm!(
    ".pushsection .rodata.limosa_resident, \"a\"",
    ".balign 16",
    // Global, because other object files refer to them; hidden, because no other program does.
    ".hidden limosa_resident_start",
    ".globl limosa_resident_start",
    ".hidden limosa_resident_wait",
    ".globl limosa_resident_wait",
    ".hidden limosa_resident_end_of_code",
    ".globl limosa_resident_end_of_code",
    "limosa_resident_start:",
    walker!("limosa_resident"),
    "limosa_resident_finish:",
    "mov eax, [r12]",
    "mov [r12 + 4], eax",
    "lea rdi, [r12 + 4]",
    "mov esi, 1", // FUTEX_WAKE
    "mov edx, 1",
    "mov eax, 202",
    "syscall",
    "limosa_resident_wait:",
    "mov edx, [r12 + 4]",
    "cmp edx, [r12]",
    "jne limosa_resident_run",
    "mov rdi, r12",
    "xor esi, esi", // FUTEX_WAIT
    "xor r10d, r10d",
    "mov eax, 202",
    "syscall",
    "jmp limosa_resident_wait",
    "limosa_resident_run:",
    "mov rbx, [r12 + 8]",
    "xor r14d, r14d",
    "jmp limosa_resident_next",
    "limosa_resident_end_of_code:",
    ".popsection",
);

/// Tells the controller that a step is done: tgkill(own process, own thread, S). The label `$done` is where
/// the thread then stands. `rbp` holds the process (low half) and the thread (high half) as the thread itself
/// knows them: in a PID namespace they are not the controller's numbers.
macro_rules! report {
    ($done:literal) => {
        concat!(
            "mov edi, ebp\n",
            "mov rsi, rbp\n",
            "shr rsi, 32\n",
            "mov edx, [rip + limosa_visitor_signal]\n",
            "mov eax, 234\n",
            "syscall\n",
            $done,
            ":\n",
        )
    };
}

// The visitor. The controller sets rip to its start and the arguments of mmap in registers. It maps scratch
// memory, reports (a stop under the controller, nothing without it), walks the program that is there by now,
// reports again, unmaps the scratch, reports a third time, and loads the thread's own registers from its data
// area. Without a controller the scratch is zeros: an END at once. It reads its data area, which is as little
// writable to it as its code, and writes only to the scratch.
global_asm!(
    ".pushsection .rodata.limosa_visitor, \"a\"",
    ".balign 16",
    // Global, because other object files refer to them; hidden, because no other program does.
    ".hidden limosa_visitor_start",
    ".globl limosa_visitor_start",
    ".hidden limosa_visitor_next",
    ".globl limosa_visitor_next",
    ".hidden limosa_visitor_mapped",
    ".globl limosa_visitor_mapped",
    ".hidden limosa_visitor_finished",
    ".globl limosa_visitor_finished",
    ".hidden limosa_visitor_unmapped",
    ".globl limosa_visitor_unmapped",
    ".hidden limosa_visitor_data",
    ".globl limosa_visitor_data",
    ".hidden limosa_visitor_end_of_code",
    ".globl limosa_visitor_end_of_code",
    "limosa_visitor_start:",
    "mov eax, 39", // getpid
    "syscall",
    "mov ebp, eax",
    "mov eax, 186", // gettid
    "syscall",
    "shl rax, 32",
    "or rbp, rax",
    "mov eax, 9", // mmap
    "syscall",
    "mov r12, rax",
    "mov rbx, rax",
    "xor r14d, r14d",
    report!("limosa_visitor_mapped"),
    "cmp r12, -4096",
    "ja limosa_visitor_leave",
    walker!("limosa_visitor"),
    "limosa_visitor_finish:",
    report!("limosa_visitor_finished"),
    "mov rdi, r12",
    "mov rsi, r13",
    "mov eax, 11", // munmap
    "syscall",
    report!("limosa_visitor_unmapped"),
    "limosa_visitor_leave:",
    "mov edi, 2", // SIG_SETMASK
    "lea rsi, [rip + limosa_visitor_mask]",
    "xor edx, edx",
    "mov r10d, 8",
    "mov eax, 14", // rt_sigprocmask
    "syscall",
    "mov rbx, [rip + limosa_visitor_rbx]",
    "mov rcx, [rip + limosa_visitor_rcx]",
    "mov rdx, [rip + limosa_visitor_rdx]",
    "mov rsi, [rip + limosa_visitor_rsi]",
    "mov rdi, [rip + limosa_visitor_rdi]",
    "mov rbp, [rip + limosa_visitor_rbp]",
    "mov r8, [rip + limosa_visitor_r8]",
    "mov r9, [rip + limosa_visitor_r9]",
    "mov r10, [rip + limosa_visitor_r10]",
    "mov r11, [rip + limosa_visitor_r11]",
    "mov r12, [rip + limosa_visitor_r12]",
    "mov r13, [rip + limosa_visitor_r13]",
    "mov r14, [rip + limosa_visitor_r14]",
    "mov r15, [rip + limosa_visitor_r15]",
    // The flags without a stack: DF by std/cld, OF by an addition that overflows, the rest by sahf.
    "mov eax, [rip + limosa_visitor_flags]",
    "test eax, 0x10000",
    "cld",
    "jz 2f",
    "std",
    "2: add al, 127",
    "sahf",
    "mov rax, [rip + limosa_visitor_rax]",
    "jmp [rip + limosa_visitor_rip]",
    ".balign 8",
    "limosa_visitor_data:",
    "limosa_visitor_rip: .quad 0",
    "limosa_visitor_rax: .quad 0",
    "limosa_visitor_rbx: .quad 0",
    "limosa_visitor_rcx: .quad 0",
    "limosa_visitor_rdx: .quad 0",
    "limosa_visitor_rsi: .quad 0",
    "limosa_visitor_rdi: .quad 0",
    "limosa_visitor_rbp: .quad 0",
    "limosa_visitor_r8: .quad 0",
    "limosa_visitor_r9: .quad 0",
    "limosa_visitor_r10: .quad 0",
    "limosa_visitor_r11: .quad 0",
    "limosa_visitor_r12: .quad 0",
    "limosa_visitor_r13: .quad 0",
    "limosa_visitor_r14: .quad 0",
    "limosa_visitor_r15: .quad 0",
    "limosa_visitor_mask: .quad 0",
    "limosa_visitor_flags: .quad 0",
    "limosa_visitor_signal: .long 0",
    "limosa_visitor_generation: .long 0",
    "limosa_visitor_end_of_code:",
    ".popsection",
);

unsafe extern "C" {
    static limosa_resident_start: u8;
    static limosa_resident_wait: u8;
    static limosa_resident_end_of_code: u8;
    static limosa_visitor_start: u8;
    static limosa_visitor_next: u8;
    static limosa_visitor_mapped: u8;
    static limosa_visitor_finished: u8;
    static limosa_visitor_unmapped: u8;
    static limosa_visitor_data: u8;
    static limosa_visitor_end_of_code: u8;
}

fn code(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: both symbols delimit one contiguous constant object of this program's read-only data.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// The resident's code.
pub static RESIDENT: LazyLock<&'static [u8]> =
    LazyLock::new(|| code(&raw const limosa_resident_start, &raw const limosa_resident_end_of_code));

/// The instruction that enters the kernel.
pub const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];

/// Offset in [`RESIDENT`] of the place where it waits for a command.
pub static RESIDENT_WAIT: LazyLock<usize> =
    LazyLock::new(|| (&raw const limosa_resident_wait).addr() - (&raw const limosa_resident_start).addr());

/// The visitor's code, followed by its data area.
pub static VISITOR: LazyLock<&'static [u8]> =
    LazyLock::new(|| code(&raw const limosa_visitor_start, &raw const limosa_visitor_end_of_code));

/// Offsets in [`VISITOR`].
#[derive(Clone, Copy, Debug)]
pub struct VisitorLayout {
    /// Where the thread stands when it has mapped the scratch (its address, or an error, in `r12`).
    pub mapped: u64,
    /// The walker: to run another program.
    pub walk: u64,
    /// Where the thread stands when a program is done.
    pub finished: u64,
    /// Where the thread stands when the scratch is unmapped.
    pub unmapped: u64,
    /// The data area: 18 words (rip, rax, rbx, rcx, rdx, rsi, rdi, rbp, r8…r15, signal mask, flags), then
    /// the signal and the generation as 32-bit numbers, up to the end.
    pub data: usize,
}

/// Where things are in [`VISITOR`].
pub fn visitor_layout() -> VisitorLayout {
    let offset = |symbol: *const u8| symbol.addr() - (&raw const limosa_visitor_start).addr();
    VisitorLayout {
        mapped: offset(&raw const limosa_visitor_mapped) as u64,
        walk: offset(&raw const limosa_visitor_next) as u64,
        finished: offset(&raw const limosa_visitor_finished) as u64,
        unmapped: offset(&raw const limosa_visitor_unmapped) as u64,
        data: offset(&raw const limosa_visitor_data),
    }
}

macro_rules! names {
    ($($constant:ident)*) => {
        /// The name of a system call that programs use.
        pub fn syscall_name(number: i64) -> Option<&'static str> {
            $(if number == libc::$constant { return Some(stringify!($constant).trim_start_matches("SYS_")); })*
            None
        }
    };
}

names! {
    SYS_arch_prctl SYS_bind SYS_brk SYS_capget SYS_capset SYS_chdir SYS_chroot SYS_clone3 SYS_close SYS_close_range SYS_connect
    SYS_dup2 SYS_dup3 SYS_epoll_create1 SYS_epoll_ctl SYS_exit SYS_exit_group SYS_fchdir SYS_fcntl SYS_flock SYS_futex
    SYS_getegid SYS_getitimer SYS_getpid SYS_getppid SYS_getsockopt SYS_gettid SYS_inotify_add_watch SYS_ioctl SYS_ioprio_set SYS_kcmp SYS_keyctl SYS_kill SYS_listen
    SYS_madvise SYS_mlock2 SYS_mmap SYS_mount SYS_mprotect SYS_mremap SYS_mseal SYS_munmap SYS_open SYS_openat SYS_personality
    SYS_pipe2 SYS_pkey_alloc SYS_pkey_free SYS_pkey_mprotect SYS_prctl SYS_preadv SYS_prlimit64 SYS_process_madvise SYS_recvfrom SYS_recvmsg SYS_request_key SYS_rseq SYS_rt_sigaction
    SYS_rt_sigprocmask SYS_rt_sigqueueinfo SYS_rt_sigtimedwait SYS_rt_tgsigqueueinfo SYS_sched_setaffinity
    SYS_sched_setattr SYS_seccomp SYS_sendmsg SYS_set_mempolicy SYS_set_robust_list SYS_set_tid_address
    SYS_setdomainname SYS_setgroups SYS_sethostname SYS_setitimer SYS_setns SYS_setpgid SYS_setpriority
    SYS_setresgid SYS_setresuid SYS_setsid SYS_setsockopt SYS_shmat SYS_shmctl SYS_shmget SYS_sigaltstack SYS_socketpair
    SYS_tgkill SYS_timer_create SYS_timer_delete SYS_timer_getoverrun SYS_timer_gettime SYS_timer_settime SYS_umask
    SYS_unshare SYS_userfaultfd SYS_wait4 SYS_waitid SYS_write
}
