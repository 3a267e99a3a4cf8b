//! **Bare launch**: a fresh process, a KVM VM, its slot and vCPU, the image mapped, run to its prompt.

use super::{numbers, serve};
use crate::bare::memory::Show;
use crate::bare::{Platform, Vm};
use crate::{Result, fail};

/// RAM in MiB. That it is there is all it has to say: whoever starts it takes the time.
pub fn run(arguments: &[u64]) -> Result<()> {
    let [mib] = numbers(arguments)?;
    let _vm = Vm::boot(&Platform::open()?, mib << 20, Show::Anonymous)?;
    serve(|_, _| fail("nothing to ask"))
}
