//! Registers: threads that hold known values in all of them while they spin, and compare afterwards.
//!
//! Each round loads general-purpose, vector, x87 and control registers, spins for about a millisecond with nothing else in
//! them, and stores them all. A freeze falls into the spin nearly always. FS is what thread-local storage stands
//! on; GS is set to a value of each thread's own. Where the CPU has AVX-512, all 32 vectors and the masks are
//! held as well.

use std::arch::{asm, is_x86_feature_detected};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::{Setting, Verify};
use crate::sys;

const THREADS: usize = 3;
const SPINS: u64 = 400_000;
/// RAX, RBX, RCX, RDX, RSI, RBP, R8 to R15; RDI points to the bank, and RSP is the thread's own.
const GENERAL: usize = 14;

/// The values to load, and then those found.
#[repr(C, align(64))]
#[derive(Clone, PartialEq)]
struct Bank {
    spins: u64,              // 0
    general: [u64; GENERAL], // 8
    control: [u32; 2],       // 120: MXCSR, x87 control word
    x87: [u64; 8],           // 128
    vectors: [[u8; 64]; 32], // 192
    masks: [u64; 8],         // 2240
}

// The offsets that the assembly uses.
const _: () = {
    assert!(std::mem::offset_of!(Bank, general) == 8);
    assert!(std::mem::offset_of!(Bank, control) == 120);
    assert!(std::mem::offset_of!(Bank, x87) == 128);
    assert!(std::mem::offset_of!(Bank, vectors) == 192);
    assert!(std::mem::offset_of!(Bank, masks) == 2240);
};

thread_local! {
    static LOCAL: Cell<u64> = const { Cell::new(0) };
}

struct Watch {
    rounds: [AtomicU64; THREADS],
    failure: Mutex<Option<String>>,
}

pub fn set_up(_: &Setting) -> Result<Box<Verify>> {
    let watch = Arc::new(Watch { rounds: Default::default(), failure: Mutex::new(None) });
    for number in 0..THREADS {
        let watch = Arc::clone(&watch);
        thread::Builder::new().name(format!("registers-{number}")).spawn(move || {
            let outcome = spin(number, &watch.rounds[number]);
            let mut failure = watch.failure.lock().unwrap_or_else(PoisonError::into_inner);
            *failure = outcome.err().map(|error| format!("thread {number}: {error:#}"));
        })?;
    }
    Ok(Box::new(move || {
        let before = watch.rounds.each_ref().map(|r| r.load(Ordering::Relaxed));
        thread::sleep(Duration::from_millis(100));
        if let Some(failure) = &*watch.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            bail!("{failure}");
        }
        for (number, (round, before)) in watch.rounds.iter().zip(before).enumerate() {
            ensure!(round.load(Ordering::Relaxed) > before, "thread {number} stands still");
        }
        Ok(format!("vectors={}", if is_x86_feature_detected!("avx512bw") { "avx512" } else { "avx" }))
    }))
}

/// Runs rounds until one goes wrong.
fn spin(number: usize, rounds: &AtomicU64) -> Result<()> {
    let gs_base = 0x7000_0000_0000 + (number as u64) * 0x1_0000;
    arch_prctl_set_gs(gs_base)?;
    LOCAL.set(number as u64 + 1);
    let (vectors, width) = if is_x86_feature_detected!("avx512bw") { (32, 64) } else { (16, 32) };
    for round in 0.. {
        let mut bank = bank(number as u64 * 1_000_003 + round, vectors, width);
        let expected = bank.clone();
        if width == 64 {
            hold_avx512(&mut bank);
        } else {
            hold_avx(&mut bank);
        }
        bank.spins = expected.spins;
        report(&bank, &expected)?;
        ensure!(arch_prctl_get_gs()? == gs_base, "GS base changed");
        ensure!(LOCAL.get() == number as u64 + 1, "thread-local storage changed");
        rounds.store(round + 1, Ordering::Relaxed);
    }
    Ok(())
}

fn bank(seed: u64, vectors: usize, width: usize) -> Bank {
    let mut words = [0_u8; GENERAL * 8];
    sys::fill(&mut words, seed);
    let mut bank = Bank {
        spins: SPINS,
        general: std::array::from_fn(|i| {
            u64::from_le_bytes(words[i * 8..][..8].try_into().unwrap_or_default())
        }),
        // Rounding towards zero and flushing to zero; x87 with double precision rounding upwards: not what a new
        // process has.
        control: [0xff80, 0x0a7f],
        x87: std::array::from_fn(|i| (f64::from(seed as u32) + f64::from(i as u32) / 8.0).to_bits()),
        vectors: [[0; 64]; 32],
        masks: [0; 8],
    };
    for (number, vector) in bank.vectors.iter_mut().take(vectors).enumerate() {
        sys::fill(&mut vector[..width], seed ^ (number as u64 + 100));
    }
    if width == 64 {
        bank.masks = std::array::from_fn(|i| seed.rotate_left(i as u32 * 7) | 1);
    }
    bank
}

fn report(found: &Bank, expected: &Bank) -> Result<()> {
    ensure!(
        found.general == expected.general,
        "general registers are {:x?} instead of {:x?}",
        found.general,
        expected.general
    );
    ensure!(
        found.control == expected.control,
        "MXCSR and x87 control are {:x?} instead of {:x?}",
        found.control,
        expected.control
    );
    ensure!(found.x87 == expected.x87, "x87 registers are {:x?} instead of {:x?}", found.x87, expected.x87);
    for (number, (found, expected)) in found.vectors.iter().zip(&expected.vectors).enumerate() {
        sys::compare(&format!("vector register {number}"), found, expected)?;
    }
    ensure!(found.masks == expected.masks, "mask registers are {:x?}", found.masks);
    Ok(())
}

/// The instructions around the spin: x87 and control registers are loaded, everything is stored and put back.
macro_rules! hold {
    ($bank:expr, [$($load:literal,)*], [$($store:literal,)*]) => {
        asm!(
            "push rbx",
            "push rbp",
            "sub rsp, 16",
            "stmxcsr [rsp]",
            "fnstcw [rsp + 8]",
            "ldmxcsr [rdi + 120]",
            "fninit",
            "fldcw [rdi + 124]",
            "fld qword ptr [rdi + 184]", "fld qword ptr [rdi + 176]",
            "fld qword ptr [rdi + 168]", "fld qword ptr [rdi + 160]",
            "fld qword ptr [rdi + 152]", "fld qword ptr [rdi + 144]",
            "fld qword ptr [rdi + 136]", "fld qword ptr [rdi + 128]",
            $($load,)*
            "mov rax, [rdi + 8]", "mov rbx, [rdi + 16]", "mov rcx, [rdi + 24]",
            "mov rdx, [rdi + 32]", "mov rsi, [rdi + 40]", "mov rbp, [rdi + 48]",
            "mov r8, [rdi + 56]", "mov r9, [rdi + 64]", "mov r10, [rdi + 72]",
            "mov r11, [rdi + 80]", "mov r12, [rdi + 88]", "mov r13, [rdi + 96]",
            "mov r14, [rdi + 104]", "mov r15, [rdi + 112]",
            "2:",
            "dec qword ptr [rdi]",
            "jnz 2b",
            "mov [rdi + 8], rax", "mov [rdi + 16], rbx", "mov [rdi + 24], rcx",
            "mov [rdi + 32], rdx", "mov [rdi + 40], rsi", "mov [rdi + 48], rbp",
            "mov [rdi + 56], r8", "mov [rdi + 64], r9", "mov [rdi + 72], r10",
            "mov [rdi + 80], r11", "mov [rdi + 88], r12", "mov [rdi + 96], r13",
            "mov [rdi + 104], r14", "mov [rdi + 112], r15",
            $($store,)*
            "fstp qword ptr [rdi + 128]", "fstp qword ptr [rdi + 136]",
            "fstp qword ptr [rdi + 144]", "fstp qword ptr [rdi + 152]",
            "fstp qword ptr [rdi + 160]", "fstp qword ptr [rdi + 168]",
            "fstp qword ptr [rdi + 176]", "fstp qword ptr [rdi + 184]",
            "stmxcsr [rdi + 120]",
            "mov dword ptr [rdi + 124], 0",
            "fnstcw [rdi + 124]",
            "fninit",
            "ldmxcsr [rsp]",
            "fldcw [rsp + 8]",
            "add rsp, 16",
            "pop rbp",
            "pop rbx",
            inout("rdi") $bank => _,
            out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("r8") _, out("r9") _, out("r10") _,
            out("r11") _, out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            clobber_abi("sysv64"),
        )
    };
}

fn hold_avx(bank: &mut Bank) {
    // SAFETY: the bank's layout is that of the offsets (checked above); all that is changed is declared or put back.
    unsafe {
        hold!(
            std::ptr::from_mut(bank),
            [
                "vmovdqu ymm0, [rdi + 192]",
                "vmovdqu ymm1, [rdi + 256]",
                "vmovdqu ymm2, [rdi + 320]",
                "vmovdqu ymm3, [rdi + 384]",
                "vmovdqu ymm4, [rdi + 448]",
                "vmovdqu ymm5, [rdi + 512]",
                "vmovdqu ymm6, [rdi + 576]",
                "vmovdqu ymm7, [rdi + 640]",
                "vmovdqu ymm8, [rdi + 704]",
                "vmovdqu ymm9, [rdi + 768]",
                "vmovdqu ymm10, [rdi + 832]",
                "vmovdqu ymm11, [rdi + 896]",
                "vmovdqu ymm12, [rdi + 960]",
                "vmovdqu ymm13, [rdi + 1024]",
                "vmovdqu ymm14, [rdi + 1088]",
                "vmovdqu ymm15, [rdi + 1152]",
            ],
            [
                "vmovdqu [rdi + 192], ymm0",
                "vmovdqu [rdi + 256], ymm1",
                "vmovdqu [rdi + 320], ymm2",
                "vmovdqu [rdi + 384], ymm3",
                "vmovdqu [rdi + 448], ymm4",
                "vmovdqu [rdi + 512], ymm5",
                "vmovdqu [rdi + 576], ymm6",
                "vmovdqu [rdi + 640], ymm7",
                "vmovdqu [rdi + 704], ymm8",
                "vmovdqu [rdi + 768], ymm9",
                "vmovdqu [rdi + 832], ymm10",
                "vmovdqu [rdi + 896], ymm11",
                "vmovdqu [rdi + 960], ymm12",
                "vmovdqu [rdi + 1024], ymm13",
                "vmovdqu [rdi + 1088], ymm14",
                "vmovdqu [rdi + 1152], ymm15",
                "vzeroupper",
            ]
        );
    }
}

fn hold_avx512(bank: &mut Bank) {
    // SAFETY: the bank's layout is that of the offsets (checked above); all that is changed is declared or put back.
    unsafe {
        hold!(
            std::ptr::from_mut(bank),
            [
                "vmovdqu64 zmm0, [rdi + 192]",
                "vmovdqu64 zmm1, [rdi + 256]",
                "vmovdqu64 zmm2, [rdi + 320]",
                "vmovdqu64 zmm3, [rdi + 384]",
                "vmovdqu64 zmm4, [rdi + 448]",
                "vmovdqu64 zmm5, [rdi + 512]",
                "vmovdqu64 zmm6, [rdi + 576]",
                "vmovdqu64 zmm7, [rdi + 640]",
                "vmovdqu64 zmm8, [rdi + 704]",
                "vmovdqu64 zmm9, [rdi + 768]",
                "vmovdqu64 zmm10, [rdi + 832]",
                "vmovdqu64 zmm11, [rdi + 896]",
                "vmovdqu64 zmm12, [rdi + 960]",
                "vmovdqu64 zmm13, [rdi + 1024]",
                "vmovdqu64 zmm14, [rdi + 1088]",
                "vmovdqu64 zmm15, [rdi + 1152]",
                "vmovdqu64 zmm16, [rdi + 1216]",
                "vmovdqu64 zmm17, [rdi + 1280]",
                "vmovdqu64 zmm18, [rdi + 1344]",
                "vmovdqu64 zmm19, [rdi + 1408]",
                "vmovdqu64 zmm20, [rdi + 1472]",
                "vmovdqu64 zmm21, [rdi + 1536]",
                "vmovdqu64 zmm22, [rdi + 1600]",
                "vmovdqu64 zmm23, [rdi + 1664]",
                "vmovdqu64 zmm24, [rdi + 1728]",
                "vmovdqu64 zmm25, [rdi + 1792]",
                "vmovdqu64 zmm26, [rdi + 1856]",
                "vmovdqu64 zmm27, [rdi + 1920]",
                "vmovdqu64 zmm28, [rdi + 1984]",
                "vmovdqu64 zmm29, [rdi + 2048]",
                "vmovdqu64 zmm30, [rdi + 2112]",
                "vmovdqu64 zmm31, [rdi + 2176]",
                "kmovq k0, [rdi + 2240]",
                "kmovq k1, [rdi + 2248]",
                "kmovq k2, [rdi + 2256]",
                "kmovq k3, [rdi + 2264]",
                "kmovq k4, [rdi + 2272]",
                "kmovq k5, [rdi + 2280]",
                "kmovq k6, [rdi + 2288]",
                "kmovq k7, [rdi + 2296]",
            ],
            [
                "vmovdqu64 [rdi + 192], zmm0",
                "vmovdqu64 [rdi + 256], zmm1",
                "vmovdqu64 [rdi + 320], zmm2",
                "vmovdqu64 [rdi + 384], zmm3",
                "vmovdqu64 [rdi + 448], zmm4",
                "vmovdqu64 [rdi + 512], zmm5",
                "vmovdqu64 [rdi + 576], zmm6",
                "vmovdqu64 [rdi + 640], zmm7",
                "vmovdqu64 [rdi + 704], zmm8",
                "vmovdqu64 [rdi + 768], zmm9",
                "vmovdqu64 [rdi + 832], zmm10",
                "vmovdqu64 [rdi + 896], zmm11",
                "vmovdqu64 [rdi + 960], zmm12",
                "vmovdqu64 [rdi + 1024], zmm13",
                "vmovdqu64 [rdi + 1088], zmm14",
                "vmovdqu64 [rdi + 1152], zmm15",
                "vmovdqu64 [rdi + 1216], zmm16",
                "vmovdqu64 [rdi + 1280], zmm17",
                "vmovdqu64 [rdi + 1344], zmm18",
                "vmovdqu64 [rdi + 1408], zmm19",
                "vmovdqu64 [rdi + 1472], zmm20",
                "vmovdqu64 [rdi + 1536], zmm21",
                "vmovdqu64 [rdi + 1600], zmm22",
                "vmovdqu64 [rdi + 1664], zmm23",
                "vmovdqu64 [rdi + 1728], zmm24",
                "vmovdqu64 [rdi + 1792], zmm25",
                "vmovdqu64 [rdi + 1856], zmm26",
                "vmovdqu64 [rdi + 1920], zmm27",
                "vmovdqu64 [rdi + 1984], zmm28",
                "vmovdqu64 [rdi + 2048], zmm29",
                "vmovdqu64 [rdi + 2112], zmm30",
                "vmovdqu64 [rdi + 2176], zmm31",
                "kmovq [rdi + 2240], k0",
                "kmovq [rdi + 2248], k1",
                "kmovq [rdi + 2256], k2",
                "kmovq [rdi + 2264], k3",
                "kmovq [rdi + 2272], k4",
                "kmovq [rdi + 2280], k5",
                "kmovq [rdi + 2288], k6",
                "kmovq [rdi + 2296], k7",
                "vzeroupper",
            ]
        );
    }
}

const ARCH_SET_GS: i32 = 0x1001;
const ARCH_GET_GS: i32 = 0x1004;

fn arch_prctl_set_gs(base: u64) -> Result<()> {
    // SAFETY: nothing in a 64-bit program of the C library uses GS.
    sys::check(unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) })
        .context("setting GS base")?;
    Ok(())
}

fn arch_prctl_get_gs() -> Result<u64> {
    let mut base = 0_u64;
    // SAFETY: the kernel writes one word to `base`.
    sys::check(unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_GS, &raw mut base) })
        .context("reading GS base")?;
    Ok(base)
}
