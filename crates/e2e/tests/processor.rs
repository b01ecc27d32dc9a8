//! Checkpoints of other processors. There is one here, so checkpoints are rewritten to what they would be there.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use limosa_e2e::limosa::{self, Said, Source};
use limosa_e2e::rewrite::{Parts, rewrite};
use limosa_e2e::sandbox::{Sandbox, sandboxed, wait_until_alone};
use limosa_e2e::target::Target;
use limosa_engine::resources::processor::Layout;

const XSTATE_BV: usize = 512;
const PKRU: u32 = 9;
const TILE_DATA: u32 = 18;
/// What every process has on a processor with protection keys.
const PKRU_DEFAULT: [u8; 4] = 0x5555_5554_u32.to_le_bytes();

/// Checkpoints the target, which ends, and gives the checkpoint as `change` makes it.
fn changed(
    sandbox: &Sandbox,
    target: &Target,
    name: &str,
    change: impl FnOnce(&mut Parts) -> Result<()>,
) -> Result<PathBuf> {
    let (out, to) = (sandbox.path(&format!("{name}-original")), sandbox.path(name));
    limosa::checkpoint(sandbox, target.root(), &out, Source::Ends, &[])?.success("checkpoint")?;
    wait_until_alone()?;
    rewrite(&out, &to, change)?;
    Ok(to)
}

/// Restores it in vain: what is missing is named, and nothing is left.
fn lacks(sandbox: &Sandbox, checkpoint: &std::path::Path, options: &[&str], words: &[&str]) -> Result<()> {
    let mut arguments = vec!["restore".as_ref(), "--detach".as_ref(), checkpoint.as_os_str()];
    arguments.extend(options.iter().map(std::ffi::OsStr::new));
    let said: Said = limosa::run(sandbox, arguments)?;
    ensure!(said.status == Some(1), "not refused: {said:?}");
    for word in words {
        ensure!(said.err.contains(word), "no {word:?} in: {}", said.err);
    }
    wait_until_alone()
}

/// Says that the checkpoint is of a processor where the registers have a part more, behind all that there is, and that all
/// threads have `bytes` in it.
fn add_part(parts: &mut Parts, number: u32, size: u32, bytes: &[u8]) -> Result<()> {
    let layout =
        parts.tree.registers.as_mut().context("the checkpoint does not tell the places of registers")?;
    layout.0.retain(|(found, ..)| *found != number);
    let end = layout.0.iter().map(|(_, offset, size)| offset + size).max().context("no part")?;
    let offset = end.next_multiple_of(64);
    layout.0.push((number, offset, size));
    for body in parts.tree.living_mut() {
        for thread in &mut body.threads {
            let area = &mut thread.state.registers.extended;
            area.resize((offset + size) as usize, 0);
            area[offset as usize..][..bytes.len()].copy_from_slice(bytes);
            area[XSTATE_BV + number as usize / 8] |= 1 << (number % 8);
        }
    }
    Ok(())
}

/// What a program could have found is required, unless the user knows better.
#[test]
fn features_that_are_missing_are_named() {
    sandboxed(|sandbox| {
        let target = Target::start(sandbox, "heartbeat", &[])?;
        let checkpoint = changed(sandbox, &target, "features", |parts| {
            ensure!(parts.meta.cpu_features.iter().any(|name| name == "sse2"), "{:?}", parts.meta);
            parts.meta.cpu_features.extend(["avx99".to_owned(), "fma99".to_owned()]);
            Ok(())
        })?;
        lacks(sandbox, &checkpoint, &[], &["does not have avx99, fma99:", "--cpu registers"])?;
        let said = limosa::run(sandbox, ["inspect".as_ref(), checkpoint.as_os_str()])?.success("inspect")?;
        ensure!(said.out.contains("of which this one lacks avx99, fma99"), "{}", said.out);
        limosa::restore(sandbox, &checkpoint, &["--cpu", "registers"])?;
        target.verify()?;
        target.quit()?;
        sandbox.end_all()
    });
}

/// Registers that are in use are required in any case.
#[test]
fn registers_that_are_missing_are_named() {
    sandboxed(|sandbox| {
        let target = Target::start(sandbox, "heartbeat", &[])?;
        let in_use =
            changed(sandbox, &target, "tiles", |parts| add_part(parts, TILE_DATA, 8192, &[7; 8192]))?;
        for options in [&[][..], &["--cpu", "registers"]] {
            lacks(
                sandbox,
                &in_use,
                options,
                &["does not have amx_tile:", "the tiles of AMX (in use by thread"],
            )?;
        }
        let said = limosa::run(sandbox, ["inspect".as_ref(), in_use.as_os_str()])?.success("inspect")?;
        ensure!(said.out.contains("in use of ") && said.out.contains("amx_tile"), "{}", said.out);

        let original = sandbox.path("tiles-original");
        let asked = sandbox.path("asked");
        rewrite(&original, &asked, |parts| {
            parts.body()?.state.prctl_state.permitted |= 1 << TILE_DATA;
            Ok(())
        })?;
        lacks(
            sandbox,
            &asked,
            &["--cpu", "registers"],
            &["does not have amx_tile:", "asked for by process"],
        )?;

        // Marked, but as in a process that has never used them.
        let unused = sandbox.path("unused");
        rewrite(&original, &unused, |parts| add_part(parts, TILE_DATA, 8192, &[]))?;
        limosa::restore(sandbox, &unused, &[])?;
        target.verify()?;
        target.quit()?;
        sandbox.end_all()
    });
}

/// Each process has rights of protection keys where there are keys: without them only ones that it has changed are missed.
#[test]
fn rights_of_protection_keys_that_nobody_changed_are_not_missed() {
    if Layout::here().0.iter().any(|(number, ..)| *number == PKRU) {
        println!("this processor has protection keys: nothing can be missing");
        return;
    }
    sandboxed(|sandbox| {
        let target = Target::start(sandbox, "registers", &[])?;
        let unchanged =
            changed(sandbox, &target, "unchanged", |parts| add_part(parts, PKRU, 8, &PKRU_DEFAULT))?;
        let changed = sandbox.path("changed");
        rewrite(&sandbox.path("unchanged-original"), &changed, |parts| {
            add_part(parts, PKRU, 8, &[0x54, 0x55])
        })?;
        lacks(
            sandbox,
            &changed,
            &["--cpu", "registers"],
            &["does not have ospke:", "rights of protection keys"],
        )?;
        limosa::restore(sandbox, &unchanged, &[])?;
        target.verify()?;
        target.quit()?;
        sandbox.end_all()
    });
}

/// Makers of processors put the parts of an XSAVE area at different places. Values were once taken from the wrong ones.
#[test]
fn registers_come_back_from_other_places() {
    sandboxed(|sandbox| {
        let target = Target::start(sandbox, "registers", &[])?;
        let checkpoint = changed(sandbox, &target, "elsewhere", |parts| {
            let here = parts.tree.registers.clone().context("no places")?;
            ensure!(here == Layout::here() && !here.0.is_empty(), "{here:?}");
            // The other way round, with gaps.
            let mut offset = 640;
            let mut there = Layout(Vec::new());
            for (number, _, size) in here.0.iter().rev() {
                there.0.push((*number, offset, *size));
                offset = (offset + size + 100).next_multiple_of(64);
            }
            for thread in parts.tree.living_mut().flat_map(|body| &mut body.threads) {
                let area = &mut thread.state.registers.extended;
                let mut moved = area[..576].to_vec();
                moved.resize(offset as usize, 0);
                for ((number, from, size), (_, to, _)) in here.0.iter().rev().zip(&there.0) {
                    ensure!(*size > 0, "part {number} is empty");
                    moved[*to as usize..][..*size as usize]
                        .copy_from_slice(&area[*from as usize..][..*size as usize]);
                }
                *area = moved;
            }
            parts.tree.registers = Some(there);
            Ok(())
        })?;
        for _ in 0..2 {
            limosa::restore(sandbox, &checkpoint, &[])?;
            target.verify()?;
            target.verify()?;
            sandbox.end_all()?;
        }
        Ok(())
    });
}
