//! Guest memory for virtual machines that fork.
pub mod addr;
pub mod check;
pub mod effect;
pub mod family;
pub mod manager;
pub mod map;
pub mod object;
pub mod ops;
pub mod rmap;
pub mod stage2;
pub mod stats;
pub mod store;
pub mod sys;
pub mod window;

pub use addr::{Gfn, GfnRange, PAGE_SHIFT, PAGE_SIZE, PageCount, PageIndex};
pub use family::VmId;
pub use manager::Manager;
pub use window::{Harvest, Run, Source, StoreId, Window};
