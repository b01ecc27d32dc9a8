//! Processes whose checkpoint was made where the vDSO is another one. There is one kernel here, so checkpoints are
//! rewritten to what they would be: see `limosa_e2e::rewrite`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use limosa_e2e::limosa::{self, Source};
use limosa_e2e::rewrite::{Parts, invented_vdso, rewrite};
use limosa_e2e::sandbox::{Sandbox, sandboxed, wait_until_alone};
use limosa_e2e::target::Target;
use limosa_puppet::VdsoImage;
use limosa_puppet::arch::redirect;
use rustix::process::Pid;

/// A line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq)]
struct Mapped {
    start: u64,
    end: u64,
    name: String,
}

fn maps(pid: Pid) -> Result<Vec<Mapped>> {
    let text = fs::read_to_string(format!("/proc/{}/maps", pid.as_raw_pid()))?;
    let parse = |line: &str| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        let address = |text| u64::from_str_radix(text, 16).ok();
        let name = line.splitn(6, ' ').nth(5).unwrap_or_default().trim_start().to_owned();
        Some(Mapped { start: address(start)?, end: address(end)?, name })
    };
    text.lines().map(|line| parse(line).with_context(|| line.to_owned())).collect()
}

/// Where the kernel's vDSO is in the process; it must have exactly one.
fn vdso_of(pid: Pid) -> Result<Mapped> {
    let found: Vec<Mapped> = maps(pid)?.into_iter().filter(|mapping| mapping.name == "[vdso]").collect();
    ensure!(found.len() == 1, "{found:?}");
    Ok(found[0].clone())
}

fn read(pid: Pid, address: u64, length: usize) -> Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; length];
    fs::File::open(format!("/proc/{}/mem", pid.as_raw_pid()))?.read_exact_at(&mut bytes, address)?;
    Ok(bytes)
}

/// A byte of the vDSO that is not code, and that nobody uses: the padding of its ELF identification.
fn another_kernel(image: &mut [u8]) {
    image[12] ^= 1;
}

/// A byte of code that is never executed, as on the same kernel with another processor.
fn another_processor(image: &mut [u8]) {
    let vdso = VdsoImage::parse(image).unwrap();
    let code = &vdso.code[0];
    let function = vdso.functions.iter().find(|function| function.name == "getcpu").unwrap();
    let behind = function.offset + function.room - 1;
    assert!(code.contains(&behind));
    image[behind] ^= 1;
}

struct Traveller<'a> {
    sandbox: &'a Sandbox,
    target: Target<'a>,
    stations: usize,
}

impl<'a> Traveller<'a> {
    fn start(sandbox: &'a Sandbox, kind: &str, options: &[&str]) -> Result<Self> {
        let target = Target::start(sandbox, kind, options)?;
        target.verify().context("before any checkpoint")?;
        Ok(Self { sandbox, target, stations: 0 })
    }

    fn pid(&self) -> Pid {
        self.target.root()
    }

    /// Checkpoints the process, which ends, and gives the checkpoint as `change` makes it.
    fn leave(&mut self, change: impl FnOnce(&mut Parts) -> Result<()>) -> Result<PathBuf> {
        self.stations += 1;
        let out = self.sandbox.path(&format!("checkpoint-{}", self.stations));
        limosa::checkpoint(self.sandbox, self.pid(), &out, Source::Ends, &[])?.success("checkpoint")?;
        self.sandbox.end_all()?;
        wait_until_alone()?;
        let changed = self.sandbox.path(&format!("changed-{}", self.stations));
        rewrite(&out, &changed, change)?;
        Ok(changed)
    }

    fn arrive(&self, checkpoint: &std::path::Path) -> Result<()> {
        limosa::restore(self.sandbox, checkpoint, &[])?;
        for _ in 0..2 {
            self.target.verify().with_context(|| format!("after {}", checkpoint.display()))?;
        }
        Ok(())
    }

    fn travel(&mut self, change: impl FnOnce(&mut Parts) -> Result<()>) -> Result<()> {
        let checkpoint = self.leave(change)?;
        self.arrive(&checkpoint)
    }
}

/// Functions at other offsets, some missing, one that this kernel may not have; then from kernel to kernel.
#[test]
fn another_layout() {
    sandboxed(|sandbox| {
        let image = match std::env::var_os("LIMOSA_TEST_VDSO") {
            Some(file) => fs::read(file)?,
            None => invented_vdso(),
        };
        let image = image[..limosa_puppet::elf_extent(&image).context("no ELF image")?].to_vec();
        let functions = VdsoImage::parse(&image).context("no vDSO")?.functions;
        let file = sandbox.path("vdso.so");
        fs::write(&file, &image)?;
        let mut options = vec![file.to_str().context("a path")?.to_owned()];
        // A kernel's own needs data for the others.
        let is_real = std::env::var_os("LIMOSA_TEST_VDSO").is_some();
        let usable = |name: &str| !is_real || !["time", "clock_getres"].contains(&name);
        options.extend(
            functions
                .iter()
                .filter(|function| usable(&function.name))
                .map(|function| format!("{}={:x}", function.name, function.offset)),
        );
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let mut traveller = Traveller::start(sandbox, "vdso", &options)?;
        let pid = traveller.pid();

        let mut face = 0;
        traveller.travel(|parts| {
            face = parts.move_to_vdso(&image)?;
            Ok(())
        })?;
        let leads_to = |name: &str| -> Result<u64> {
            let function =
                functions.iter().find(|function| function.name == name).context("no such function")?;
            let code = read(pid, face + function.offset as u64, 12)?;
            redirect::jump_target(&code).with_context(|| format!("{name} is not led on: {code:x?}"))
        };
        let (vdso, before) = (vdso_of(pid)?, maps(pid)?.len());
        for name in ["clock_gettime", "gettimeofday", "getcpu"] {
            let target = leads_to(name)?;
            let in_vdso = VdsoImage::parse(&read(pid, vdso.start, (vdso.end - vdso.start) as usize)?);
            let offset = in_vdso.context("no vDSO")?.offset_of(name).context("no such function")?;
            ensure!(target == vdso.start + offset as u64, "{name} leads to {target:#x}, not into {vdso:x?}");
        }

        // The same kernel: all stays as it is.
        traveller.travel(|_| Ok(()))?;
        ensure!(vdso_of(pid)? == vdso, "the vDSO has moved on the same kernel");
        // Others, again and again: each leaves nothing behind.
        for number in 1..=3_u8 {
            traveller.travel(|parts| parts.change_vdso(|image| image[12] = number))?;
            let now = vdso_of(pid)?;
            ensure!(
                leads_to("clock_gettime")? > now.start && leads_to("clock_gettime")? < now.end,
                "{now:x?}"
            );
            ensure!(maps(pid)?.len() == before, "mappings have grown from {before}: {:#x?}", maps(pid)?);
        }
        traveller.target.quit()?;
        sandbox.end_all()
    });
}

/// To another kernel, to a third, home, and to another processor.
fn there_and_back(sandbox: &Sandbox, kind: &str) -> Result<()> {
    let mut traveller = Traveller::start(sandbox, kind, &[])?;
    let pid = traveller.pid();
    let (home, before) = (vdso_of(pid)?, maps(pid)?.len());
    for _ in 0..2 {
        traveller.travel(|parts| parts.change_vdso(|image| another_kernel(image)))?;
        ensure!(vdso_of(pid)? != home, "the vDSO of another kernel was taken for this one's");
        ensure!(maps(pid)?.iter().any(|mapping| mapping.start == home.start), "the old code is gone");
    }
    // What distinguished the first kernel is taken back: the process is home, with another processor.
    traveller.travel(|parts| {
        parts.change_vdso(|image| another_kernel(image))?;
        let (own, _) = parts.vdso()?;
        let byte = own.image[12] ^ 1;
        parts.write(home.start + 12, &[byte])
    })?;
    ensure!(vdso_of(pid)? == home && maps(pid)?.len() == before, "not home: {:#x?}", maps(pid)?);
    traveller.travel(|parts| parts.change_vdso(|image| another_processor(image)))?;
    ensure!(vdso_of(pid)? == home && maps(pid)?.len() == before, "moved: {:#x?}", maps(pid)?);
    traveller.target.quit()?;
    sandbox.end_all()
}

/// Threads that a freeze finds inside of the vDSO.
#[test]
fn threads_inside() {
    sandboxed(|sandbox| there_and_back(sandbox, "vdso"));
}

/// Processes that share pages with each other, also those of an old vDSO.
#[test]
fn a_forked_family() {
    sandboxed(|sandbox| there_and_back(sandbox, "memory-forked"));
}

/// What cannot be adapted: a thread in the middle of the old code, or one that will return there.
#[test]
fn what_needs_the_old_code_is_refused() {
    sandboxed(|sandbox| {
        let mut traveller = Traveller::start(sandbox, "vdso", &[])?;
        let refused = |checkpoint: &std::path::Path, word: &str| -> Result<()> {
            let said = limosa::run(sandbox, ["restore".as_ref(), checkpoint.as_os_str()])?;
            ensure!(said.status == Some(1) && said.err.contains(word), "{word}: {said:?}");
            ensure!(said.err.contains("take the checkpoint again"), "{said:?}");
            wait_until_alone()
        };
        let pid = traveller.pid().as_raw_pid().to_string();
        let inside = traveller.leave(|parts| {
            parts.change_vdso(|image| another_kernel(image))?;
            let (vdso, start) = parts.vdso()?;
            let functions = VdsoImage::parse(&vdso.image).context("no vDSO")?.functions;
            parts.body()?.threads[0].state.registers.general[16] = start + functions[0].offset as u64 + 7;
            Ok(())
        })?;
        refused(&inside, &format!("thread {pid}, stopped inside the vDSO"))?;

        let first = sandbox.path("checkpoint-1");
        let returning = sandbox.path("returning");
        rewrite(&first, &returning, |parts| {
            parts.change_vdso(|image| another_kernel(image))?;
            let (vdso, start) = parts.vdso()?;
            let functions = VdsoImage::parse(&vdso.image).context("no vDSO")?.functions;
            let address = start + functions[0].offset as u64 + 7;
            let stack = parts.body()?.threads[0].state.registers.stack_pointer() & !7;
            let frame: Vec<u8> = [address, 0x246, 0x002b_0000_0000_0033]
                .iter()
                .flat_map(|word: &u64| word.to_le_bytes())
                .collect();
            parts.write(stack + 0x100, &frame)
        })?;
        refused(&returning, "in a signal handler that will return into the vDSO")?;

        let unknown = sandbox.path("unknown");
        rewrite(&first, &unknown, |parts| {
            parts.change_vdso(|image| another_kernel(image))?;
            parts.tree.vdso = None;
            Ok(())
        })?;
        let said = limosa::run(sandbox, ["restore".as_ref(), unknown.as_os_str()])?;
        ensure!(said.status == Some(1) && said.err.contains("vDSO of the checkpoint"), "{said:?}");

        // Unchanged, the checkpoint is good.
        traveller.arrive(&first)?;
        traveller.target.quit()?;
        sandbox.end_all()
    });
}
