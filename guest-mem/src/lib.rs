//! Guest memory for virtual machines that fork.

pub mod addr;
pub mod window;

pub use addr::{Gfn, GfnRange, PAGE_SHIFT, PAGE_SIZE, PageCount, PageIndex};
pub use window::{Harvest, Run, Source, StoreId, Window};
