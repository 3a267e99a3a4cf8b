//! The devices, in ACPI's machine language.

use crate::devices::virtio;
use crate::layout::{devices, linux};
use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope, ZERO,
};

/// What a notification says, for both events: for the button that it was pushed, for the generation id that it is new.
const EVENT: u8 = 0x80;
/// The sleep type that is "off".
pub const OFF: u8 = 5;

/// The whole block of definitions.
pub fn code(vcpus: u8, virtio: &[virtio::Kind]) -> Vec<u8> {
    let mut code = Vec::new();
    for number in 0..vcpus {
        processor(number, &mut code);
    }
    serial(&mut code);
    for number in 0..virtio.len() as u32 {
        virtio_device(number, &mut code);
    }
    power_button(&mut code);
    generation(&mut code);
    events(&mut code);
    Name::new("\\_S5_".into(), &Package::new(vec![&OFF, &ZERO, &ZERO, &ZERO])).to_aml_bytes(&mut code);
    code
}

/// An edge-triggered interrupt, active high, that nothing else has.
fn interrupt(line: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, line)
}

fn in_system_bus(device: &Device<'_>, code: &mut Vec<u8>) {
    Scope::new("\\_SB_".into(), vec![device]).to_aml_bytes(code);
}

fn processor(number: u8, code: &mut Vec<u8>) {
    let path = Path::new(&format!("C{number:03}"));
    let id = Name::new("_HID".into(), &"ACPI0007");
    let uid = Name::new("_UID".into(), &number);
    in_system_bus(&Device::new(path, vec![&id, &uid]), code);
}

fn serial(code: &mut Vec<u8>) {
    let ports = IO::new(devices::COM1, devices::COM1, 0, 8);
    let line = interrupt(devices::COM1_IRQ);
    let resources = ResourceTemplate::new(vec![&ports, &line]);
    let id = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let uid = Name::new("_UID".into(), &ZERO);
    let resources = Name::new("_CRS".into(), &resources);
    in_system_bus(&Device::new("COM1".into(), vec![&id, &uid, &resources]), code);
}

fn virtio_device(number: u32, code: &mut Vec<u8>) {
    let registers = Memory32Fixed::new(true, devices::VIRTIO + number * devices::VIRTIO_SIZE, devices::VIRTIO_SIZE);
    let line = interrupt(devices::VIRTIO_IRQ + number);
    let id = Name::new("_HID".into(), &"LNRO0005");
    let uid = Name::new("_UID".into(), &number);
    let coherent = Name::new("_CCA".into(), &acpi_tables::aml::ONE);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &line]));
    let path = Path::new(&format!("V{number:03}"));
    in_system_bus(&Device::new(path, vec![&id, &uid, &coherent, &resources]), code);
}

fn power_button(code: &mut Vec<u8>) {
    let id = Name::new("_HID".into(), &EISAName::new("PNP0C0C"));
    let uid = Name::new("_UID".into(), &ZERO);
    in_system_bus(&Device::new("PWRB".into(), vec![&id, &uid]), code);
}

/// The generation id: the guest finds the device by the name "VM_Gen_Counter" and the id's place by `ADDR`, the low and
/// the high half of its address.
fn generation(code: &mut Vec<u8>) {
    let id = Name::new("_HID".into(), &"OFFS0001");
    let compatible = Name::new("_CID".into(), &"VM_Gen_Counter");
    let name = Name::new("_DDN".into(), &"VM_Gen_Counter");
    let low = linux::GENERATION_ID as u32;
    let high = (linux::GENERATION_ID >> 32) as u32;
    let address = Name::new("ADDR".into(), &Package::new(vec![&low, &high]));
    in_system_bus(&Device::new("VGEN".into(), vec![&id, &compatible, &name, &address]), code);
}

/// The generic event device: its interrupts become notifications of other devices.
fn events(code: &mut Vec<u8>) {
    let lines = [devices::GENERATION_IRQ, devices::POWER_IRQ];
    let [generation_line, power_line] = lines.map(interrupt);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&generation_line, &power_line]));
    let (generation, button) = (Path::new("\\_SB_.VGEN"), Path::new("\\_SB_.PWRB"));
    let [generation_line, power_line] = lines.map(|line| line as u8);
    let (is_generation, is_power) = (Equal::new(&Arg(0), &generation_line), Equal::new(&Arg(0), &power_line));
    let (tell_generation, tell_button) = (Notify::new(&generation, &EVENT), Notify::new(&button, &EVENT));
    let on_generation = If::new(&is_generation, vec![&tell_generation]);
    let on_power = If::new(&is_power, vec![&tell_button]);
    let method = Method::new("_EVT".into(), 1, true, vec![&on_generation, &on_power]);
    let id = Name::new("_HID".into(), &"ACPI0013");
    let uid = Name::new("_UID".into(), &ZERO);
    in_system_bus(&Device::new("GED_".into(), vec![&id, &uid, &resources, &method]), code);
}
