//! The kernels that machines boot: Debian's for clouds, as their packages installed them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Modules that a machine needs, dependencies left out. What a kernel has built in is skipped.
const MODULES: [&str; 16] = [
    "virtio_pci",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
    "fuse",
    "tun",
    "overlay",
    "bridge",
    "veth",
    "nf_tables",
    "nft_reject_inet",
    "tcp_diag",
    "udp_diag",
    "unix_diag",
    "netlink_diag",
    "af_packet_diag",
];

/// A kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// As uname(2) gives it: `6.1.0-56-cloud-amd64`.
    pub release: String,
    /// The file that is booted.
    pub image: PathBuf,
}

/// A module, as the kernel loads it.
#[derive(Debug)]
pub struct Module {
    /// `overlay.ko`
    pub file: String,
    /// Not compressed.
    pub content: Vec<u8>,
}

impl Kernel {
    /// All that are installed, by version.
    pub fn installed() -> Result<Vec<Self>> {
        let mut kernels = Vec::new();
        for entry in fs::read_dir("/boot").context("listing /boot")? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if let Some(release) = name.strip_prefix("vmlinuz-").filter(|name| name.contains("-cloud-")) {
                kernels.push(Self { release: release.to_owned(), image: Path::new("/boot").join(&name) });
            }
        }
        kernels.sort_by_key(|kernel| version(&kernel.release));
        ensure!(!kernels.is_empty(), "no kernel to boot: run scripts/ensure-packages vm");
        Ok(kernels)
    }

    /// The oldest.
    pub fn oldest() -> Result<Self> {
        Ok(Self::installed()?.swap_remove(0))
    }

    /// The newest. Where one is installed, it is the oldest, too.
    pub fn newest() -> Result<Self> {
        Self::installed()?.pop().context("no kernel to boot")
    }

    /// The modules that a machine loads, in the order in which they can be loaded.
    pub fn modules(&self) -> Result<Vec<Module>> {
        let directory = Path::new("/lib/modules").join(&self.release);
        let read = |name| {
            let path = directory.join(name);
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        let (dependencies, builtin) = (read("modules.dep")?, read("modules.builtin")?);
        let files: HashMap<String, Vec<&str>> = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(file, needs)| {
                // A module comes after what it needs, which modules.dep gives the other way round.
                let needs = needs.split_whitespace().rev();
                (module_name(file), needs.chain([file]).collect())
            })
            .collect();
        let builtin: Vec<_> = builtin.lines().map(module_name).collect();
        let mut ordered: Vec<&str> = Vec::new();
        for module in MODULES {
            match files.get(module) {
                Some(needed) => {
                    for file in needed {
                        if !ordered.contains(file) {
                            ordered.push(file);
                        }
                    }
                }
                None => ensure!(
                    builtin.iter().any(|name| name == module),
                    "the kernel {} has no module {module}",
                    self.release
                ),
            }
        }
        ordered.into_iter().map(|file| load(&directory.join(file))).collect()
    }
}

/// The numbers in a release, for comparison.
fn version(release: &str) -> Vec<u64> {
    release
        .split(|character: char| !character.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

/// `kernel/fs/overlayfs/overlay.ko.xz` is `overlay`; the kernel takes `-` for `_` in names of modules.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split_once(".ko").map_or(name, |(name, _)| name).replace('-', "_")
}

fn load(path: &Path) -> Result<Module> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let content = if let Some(name) = name.strip_suffix(".xz") {
        let output = Command::new("xz").arg("-dc").arg(path).output().context("running xz")?;
        ensure!(output.status.success(), "xz -dc {name}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    } else {
        fs::read(path).with_context(|| format!("reading {}", path.display()))?
    };
    let file = name.strip_suffix(".xz").unwrap_or(&name).to_owned();
    ensure!(content.starts_with(b"\x7fELF"), "{name} is compressed in a way that is not known here");
    Ok(Module { file, content })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(version("6.12.117+deb12-cloud-amd64") > version("6.1.0-56-cloud-amd64"));
        assert!(version("6.1.0-9-cloud-amd64") < version("6.1.0-56-cloud-amd64"));
    }

    #[test]
    fn modules_have_one_name() {
        assert_eq!(module_name("kernel/drivers/char/hw_random/virtio-rng.ko.xz"), "virtio_rng");
        assert_eq!(module_name("kernel/fs/overlayfs/overlay.ko"), "overlay");
    }
}
