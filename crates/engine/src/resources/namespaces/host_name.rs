//! The UTS namespace: host and domain name (uts_namespaces(7)).

use limosa_kernel::namespace::{self, Kind};
use limosa_kernel::proc::ProcDir;
use limosa_puppet::Program;
use serde::{Deserialize, Serialize};

use super::Namespace;
use crate::error::{CaptureError, RestoreError};
use crate::view::ProcessView;

/// The names of a UTS namespace.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostName {
    /// `sethostname`
    pub host: serde_bytes::ByteBuf,
    /// `setdomainname`
    pub domain: serde_bytes::ByteBuf,
}

impl Namespace for HostName {
    fn capture(root: &ProcessView) -> Result<Self, CaptureError> {
        let theirs = namespace::of_process(root.pid, Kind::Uts)?;
        // uname(2) tells of the caller's namespace: a thread of its own looks, and ends.
        let names = std::thread::scope(|scope| {
            let look = scope.spawn(|| -> limosa_kernel::Result<_> {
                namespace::enter(&theirs, Kind::Uts)?;
                let names = rustix::system::uname();
                Ok((names.nodename().to_bytes().to_vec(), names.domainname().to_bytes().to_vec()))
            });
            look.join()
        });
        let (host, domain) = names.map_err(|_| CaptureError::Ended { pid: root.pid })??;
        Ok(Self { host: host.into(), domain: domain.into() })
    }

    fn rebuild(&self, _: &ProcDir, program: &mut Program) -> Result<(), RestoreError> {
        let host = program.bytes(&self.host);
        program.call("set the host name", libc::SYS_sethostname, [host.into(), self.host.len().into()]);
        let domain = program.bytes(&self.domain);
        program.call(
            "set the domain name",
            libc::SYS_setdomainname,
            [domain.into(), self.domain.len().into()],
        );
        Ok(())
    }
}
